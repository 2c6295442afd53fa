-- How many leading names of a chain each holder has.
-- KEYS[1] prefix; ARGV: chain (16 bytes a name), then worker, incarnation of each holder.
-- Answers depth, representation of each holder, in order. Binary search: holdings are prefix-closed.
local prefix, chain = KEYS[1], ARGV[1]
local length = #chain / 16

local function has(key, position)
  return redis.call('SISMEMBER', key, string.sub(chain, position * 16 - 15, position * 16)) == 1
end

local answer = {}
for at = 2, #ARGV, 2 do
  local holder = ARGV[at] .. ':' .. ARGV[at + 1]
  local blocks = prefix .. ':blocks:' .. holder
  local low, high = 0, length -- `low` is held (or 0), everything past `high` is not
  if has(blocks, 1) then low = 1 else high = 0 end
  while low < high do
    local middle = math.floor((low + high + 1) / 2)
    if has(blocks, middle) then low = middle else high = middle - 1 end
  end
  local representation = low > 0 and redis.call('HGET', prefix .. ':holding:' .. holder, 'representation')
  if not representation then low = 0 end -- names without their tag are of no use
  answer[#answer + 1] = low
  answer[#answer + 1] = representation or ''
end
return answer
