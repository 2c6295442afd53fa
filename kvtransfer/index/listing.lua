-- Everybody who is alive. KEYS[1] prefix.
-- Answers the server's run id, then worker, record, load, age in ms of each.
local prefix = KEYS[1]
local answer = { string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') or '' }
for _, worker in ipairs(redis.call('SMEMBERS', prefix .. ':workers')) do
  local member = prefix .. ':member:' .. worker
  local fields = redis.call('HMGET', member, 'record', 'load', 'ttl_ms')
  if fields[1] and fields[2] and fields[3] then
    local age_ms = tonumber(fields[3]) - redis.call('PTTL', member)
    for _, value in ipairs({ worker, fields[1], fields[2], age_ms }) do
      answer[#answer + 1] = value
    end
  end
end
return answer
