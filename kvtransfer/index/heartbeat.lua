-- A worker is alive. KEYS[1] prefix; ARGV: worker, incarnation, load. Answers current, unknown or fenced.
local prefix, worker, incarnation = KEYS[1], ARGV[1], ARGV[2]
local member = prefix .. ':member:' .. worker
local fields = redis.call('HMGET', member, 'incarnation', 'ttl_ms')
if fields[1] == incarnation then
  redis.call('HSET', member, 'load', ARGV[3])
  redis.call('PEXPIRE', member, fields[2])
  return 'current'
end
if fields[1] or redis.call('SISMEMBER', prefix .. ':void:' .. worker, incarnation) == 1 then
  return 'fenced'
end
return 'unknown'
