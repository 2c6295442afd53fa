-- Every holder. KEYS[1] prefix. Answers worker, incarnation, seq, representation of each.
local prefix = KEYS[1]
local answer = {}
for _, worker in ipairs(redis.call('SMEMBERS', prefix .. ':workers')) do
  for _, incarnation in ipairs(redis.call('SMEMBERS', prefix .. ':held:' .. worker)) do
    local holding = prefix .. ':holding:' .. worker .. ':' .. incarnation
    local fields = redis.call('HMGET', holding, 'seq', 'representation')
    if fields[1] and fields[2] then
      for _, value in ipairs({ worker, incarnation, fields[1], fields[2] }) do
        answer[#answer + 1] = value
      end
    end
  end
end
return answer
