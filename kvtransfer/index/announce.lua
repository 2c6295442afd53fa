-- A worker says who it is. Another incarnation before it is fenced, and its names are forgotten.
-- KEYS[1] prefix; ARGV: worker, incarnation, record, load, ttl_ms, fence_ms. Answers current or fenced.
local prefix, worker, incarnation = KEYS[1], ARGV[1], ARGV[2]
local void, last = prefix .. ':void:' .. worker, prefix .. ':last:' .. worker
if redis.call('SISMEMBER', void, incarnation) == 1 then return 'fenced' end

local before = redis.call('GET', last)
if before ~= incarnation then
  if before then
    redis.call('SADD', void, before)
    redis.call('PEXPIRE', void, ARGV[6])
  end
  local held = prefix .. ':held:' .. worker
  for _, other in ipairs(redis.call('SMEMBERS', held)) do
    if other ~= incarnation then
      local holder = worker .. ':' .. other
      redis.call('UNLINK', prefix .. ':blocks:' .. holder, prefix .. ':holding:' .. holder)
      redis.call('SREM', held, other)
    end
  end
  redis.call('SET', last, incarnation)
end

local member = prefix .. ':member:' .. worker
redis.call('HMSET', member, 'incarnation', incarnation, 'record', ARGV[3], 'load', ARGV[4], 'ttl_ms', ARGV[5])
redis.call('PEXPIRE', member, ARGV[5])
redis.call('SADD', prefix .. ':workers', worker)
return 'current'
