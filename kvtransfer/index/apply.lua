-- One numbered change of a holder's names.
-- KEYS[1] prefix; ARGV: add|remove|replace, worker, incarnation, seq, representation, names (16 bytes each).
-- Answers applied, stale or gap; the latter two change nothing.
local prefix = KEYS[1]
local change, worker, incarnation = ARGV[1], ARGV[2], ARGV[3]
local seq, representation, names = tonumber(ARGV[4]), ARGV[5], ARGV[6]
local holder = worker .. ':' .. incarnation
local blocks, holding = prefix .. ':blocks:' .. holder, prefix .. ':holding:' .. holder

local known = redis.call('HMGET', holding, 'seq', 'representation')
local last = tonumber(known[1] or 0)
if seq <= last then return 'stale' end
if change ~= 'replace' then
  if seq ~= last + 1 then return 'gap' end
  if change == 'add' and known[2] and known[2] ~= representation then return 'gap' end
  if change == 'remove' and not known[2] then return 'gap' end
end

if change == 'replace' then redis.call('UNLINK', blocks) end
if change == 'remove' then
  redis.call('HSET', holding, 'seq', ARGV[4])
else
  redis.call('HMSET', holding, 'seq', ARGV[4], 'representation', representation)
end
if not known[1] then
  redis.call('SADD', prefix .. ':workers', worker)
  redis.call('SADD', prefix .. ':held:' .. worker, incarnation)
end

local command = change == 'remove' and 'SREM' or 'SADD'
local part = {}
for at = 1, #names, 16 do
  part[#part + 1] = string.sub(names, at, at + 15)
  if #part == 1000 then -- Lua's stack bounds the arguments of one call
    redis.call(command, blocks, unpack(part))
    part = {}
  end
end
if #part > 0 then redis.call(command, blocks, unpack(part)) end
return 'applied'
