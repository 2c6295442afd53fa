-- A worker leaves for good. KEYS[1] prefix; ARGV: worker, incarnation, fence_ms.
local prefix, worker, incarnation = KEYS[1], ARGV[1], ARGV[2]
local holder = worker .. ':' .. incarnation
redis.call('UNLINK', prefix .. ':blocks:' .. holder, prefix .. ':holding:' .. holder)
redis.call('SREM', prefix .. ':held:' .. worker, incarnation)
local member, last = prefix .. ':member:' .. worker, prefix .. ':last:' .. worker
if redis.call('HGET', member, 'incarnation') == incarnation then redis.call('UNLINK', member) end
if redis.call('GET', last) == incarnation then redis.call('UNLINK', last) end
redis.call('SADD', prefix .. ':void:' .. worker, incarnation)
redis.call('PEXPIRE', prefix .. ':void:' .. worker, ARGV[3])
return 1
