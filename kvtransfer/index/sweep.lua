-- Forget names whose holder is not alive. KEYS[1] prefix; ARGV: most workers to look at.
-- Answers how many holders went. Looks at random workers, so that repeated bounded calls reach everybody.
local prefix = KEYS[1]
local swept = 0
for _, worker in ipairs(redis.call('SRANDMEMBER', prefix .. ':workers', ARGV[1])) do
  local alive = redis.call('HGET', prefix .. ':member:' .. worker, 'incarnation')
  local held = prefix .. ':held:' .. worker
  for _, incarnation in ipairs(redis.call('SMEMBERS', held)) do
    if incarnation ~= alive then
      local holder = worker .. ':' .. incarnation
      redis.call('UNLINK', prefix .. ':blocks:' .. holder, prefix .. ':holding:' .. holder)
      redis.call('SREM', held, incarnation)
      swept = swept + 1
    end
  end
  if not alive then
    redis.call('SREM', prefix .. ':workers', worker)
    redis.call('UNLINK', prefix .. ':last:' .. worker)
  end
end
return swept
