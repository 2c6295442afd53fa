-- Forget what one holder has. KEYS[1] prefix; ARGV: worker, incarnation.
local prefix, worker, incarnation = KEYS[1], ARGV[1], ARGV[2]
local holder = worker .. ':' .. incarnation
redis.call('UNLINK', prefix .. ':blocks:' .. holder, prefix .. ':holding:' .. holder)
redis.call('SREM', prefix .. ':held:' .. worker, incarnation)
return 1
