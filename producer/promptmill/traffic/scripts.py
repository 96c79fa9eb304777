"""The scripts that own a subject's health and a model's limits. Each works on one hash tag; times are Redis's, in µs.

The fields of ``health``, each absent where there is nothing to say: ``ring`` (the last outcomes, 1 is sick), ``row``
(sick ones since the last good one), ``code`` (the last failure), ``open``, ``until``, ``opens`` (the breaker: whether,
until when, how often in a row), ``hold``, ``why`` (nobody is admitted until then: the provider's own wait),
``cap``, ``capend``, ``cut``, ``oks``, ``first`` (the learned cap). Whoever changes what others act on publishes all of
it in the same act.

The fields of ``paces``: ``r`` and ``t``, the theoretical arrival times of requests and tokens (the generic cell rate
algorithm: one number holds a whole bucket), and ``v``, the turn that was served last.

Fairness is start-time fair queueing. Each user has a turn (``turns``), which moves on by one with each call. Users that
wait stand in ``line``: those with the fewest running calls first where calls at once are limited, then by turn. A user
is admitted only if enough is left for all that stand before them too.
"""

from __future__ import annotations

from typing import Final

from promptmill.keys import TRAFFIC
from promptmill.store.scripts import Script

_PRELUDE: Final = """
local function now_us()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end
local function num(v) return tonumber(v or '') or 0 end
local function int(v) return string.format('%.0f', v) end
local function exact(v) return string.format('%.17g', v) end
local function let_go(running, held, lease)
  if redis.call('ZREM', running, lease) == 0 then return nil end
  local user = string.match(lease, ' (.*)$')
  if redis.call('HINCRBY', held, user, -1) <= 0 then redis.call('HDEL', held, user) end
  return user
end
-- A call of theirs ended: whoever waits moves up.
local function move_up(line, user)
  if num(redis.call('ZSCORE', line, user)) >= LANE then redis.call('ZINCRBY', line, -LANE, user) end
end
local function load(health)
  local s, raw = {}, redis.call('HGETALL', health)
  for i = 1, #raw, 2 do s[raw[i]] = raw[i + 1] end
  return s
end
local function save(health, s, ttl)
  local flat = {}
  for k, v in pairs(s) do
    flat[#flat + 1] = k
    if type(v) == 'number' then v = int(v) end
    flat[#flat + 1] = v
    s[k] = v
  end
  redis.call('DEL', health)
  if #flat > 0 then
    redis.call('HSET', health, unpack(flat))
    redis.call('PEXPIRE', health, ttl)
  end
end
local function tell(subject, s, now)
  local said = {subject = subject, now = int(now)}
  if next(s) then said.health = s end
  redis.call('PUBLISH', 'CHANNEL', cjson.encode(said))
end
""".replace("CHANNEL", TRAFFIC)

# KEYS: health, probe, paces, running, held, line, turns
# ARGV: rules, ttl ms, subject, verdict, code, probe's token, jitter, hold us, why, lease, tokens' correction us,
#       limited (1), calls at once here, configured concurrency
_REPORT: Final = """
local rules, ttl, subject, verdict, code, token = cjson.decode(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local jitter, hold, why, lease, correction = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9], ARGV[10], tonumber(ARGV[11])
local limited, here, fixed = ARGV[12] == '1', tonumber(ARGV[13]), tonumber(ARGV[14])
local now, s, told, changed = now_us(), load(KEYS[1]), false, false

local function open()
  s.open = 1
  s.opens = num(s.opens) + 1
  s['until'] = now + math.min(rules.backoff_s * 2 ^ (s.opens - 1), rules.backoff_max_s) * jitter
  told = true
end
local function judge()
  local probing = token ~= '' and redis.call('GET', KEYS[2]) == token
  if probing then redis.call('DEL', KEYS[2]) end
  if s.open then
    -- Only a probe judges: what began before the breaker opened tells of the past.
    if token ~= '' and verdict == 'ok' then
      s.open, s['until'], s.opens, s.ring, s.row, s.code = nil, nil, nil, nil, nil, nil
      told = true
    elseif probing and verdict == 'sick' then
      s.code = code
      open()
    elseif probing then
      told = true
    end
  elseif verdict == 'sick' then
    told, changed = told or not s.ring, true
    s.ring, s.row, s.code = string.sub((s.ring or '') .. '1', -rules.last), num(s.row) + 1, code
    local _, sick = string.gsub(s.ring, '1', '')
    if s.row >= rules.sick_in_row or sick >= rules.sick_of_last then open() end
  elseif verdict == 'ok' and s.ring then
    s.ring, s.row, changed = string.sub(s.ring .. '0', -rules.last), 0, true
    if not string.find(s.ring, '1', 1, true) then
      s.ring, s.row, s.code = nil, nil, nil
      told = true
    end
  end
end
local function hold_up()
  -- A little longer than what is known already is not worth everybody's attention.
  if hold > 0 and now + hold > num(s.hold) + 50000 then
    s.hold, s.why, told = now + hold, why, true
    if why == 'cooldown' then s.code = code end
  elseif s.hold and num(s.hold) < now then
    s.hold, s.why, changed = nil, nil, true
  end
end
local function adapt()
  local cap = num(s.cap)
  if cap > 0 and num(s.capend) <= now then
    s.cap, s.capend, s.cut, s.oks, s.first, cap, told = nil, nil, nil, nil, nil, 0, true
  end
  local running = redis.call('ZCARD', KEYS[4])
  if limited then
    if now - num(s.cut) >= rules.cut_every_s then
      local base = math.max(running, here)
      if cap > 0 then base = math.min(base, cap) end
      if fixed > 0 then base = math.min(base, fixed) end
      s.first = cap == 0 and 1 or nil
      s.cap, s.cut, s.oks, told = math.max(1, math.floor(base / 2)), now, 0, true
    end
    s.capend, changed = now + rules.cap_s, true
  elseif verdict == 'ok' and cap > 0 then
    changed, s.oks = true, num(s.oks) + 1
    -- A cap that nobody comes near to has not been tried.
    if s.oks >= rules.oks_a_step and running * 2 >= cap then s.cap, s.oks = cap + 1, 0 end
  end
end
local function release()
  local user = let_go(KEYS[4], KEYS[5], lease)
  if not user then return end
  move_up(KEYS[6], user)
  if correction ~= 0 then
    local t = redis.call('HGET', KEYS[3], 't')
    if t then redis.call('HSET', KEYS[3], 't', int(num(t) + correction)) end
  end
end

judge()
hold_up()
adapt()
if lease ~= '' then release() end
if told or changed then save(KEYS[1], s, ttl) end
if told then tell(subject, s, now) end
return 1
"""

# KEYS: health, probe. ARGV: token, lease us. {1}: it is yours; {2}: nothing is wrong; {0, us}: wait
_PROBE: Final = """
local now, s = now_us(), redis.call('HMGET', KEYS[1], 'open', 'until')
if not s[1] then return {2, 0} end
if num(s[2]) > now then return {0, num(s[2]) - now} end
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', math.floor(tonumber(ARGV[2]) / 1000)) then return {1, 0} end
return {0, 0}
"""

# KEYS: health, probe, running, held. ARGV: lease us, ttl ms, cut every us, probe's token, leases …
_RENEW: Final = """
local now, ttl = now_us(), ARGV[2]
local ends = int(now + tonumber(ARGV[1]))
if ARGV[4] ~= '' and redis.call('GET', KEYS[2]) == ARGV[4] then
  redis.call('PEXPIRE', KEYS[2], math.floor(tonumber(ARGV[1]) / 1000))
end
for i = 5, #ARGV do
  -- One that ran out while its worker was away still runs: it counts again.
  if redis.call('ZADD', KEYS[3], ends, ARGV[i]) == 1 then
    redis.call('HINCRBY', KEYS[4], string.match(ARGV[i], ' (.*)$'), 1)
  end
end
if #ARGV > 4 then
  redis.call('PEXPIRE', KEYS[3], ttl)
  redis.call('PEXPIRE', KEYS[4], ttl)
end
-- The first cut knew the calls of one worker only; when the others have told theirs, it is made on all.
local s = redis.call('HMGET', KEYS[1], 'first', 'cut', 'cap')
if s[1] and now - num(s[2]) < tonumber(ARGV[3]) then
  -- And one: the call that was refused is among them no more.
  local half = math.floor((redis.call('ZCARD', KEYS[3]) + 1) / 2)
  if half > num(s[3]) then redis.call('HSET', KEYS[1], 'cap', half) end
end
return 1
"""

# KEYS: health, paces, running, held, line, due, needs, turns
# ARGV: lease, user, tokens, concurrency (0: none), us a request (0), us a token (0), requests' burst us, tokens' burst
#       us, lease us, ttl ms, others of this user wait here (0, 1), slot's wait us
# {1, 0, ''}: granted. {0, us, reason}: ask again then
_ADMIT: Final = """
local lease, user, tokens, cap = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local a_request, a_token, burst_r, burst_t = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local now, ttl, others, slot_wait = now_us(), ARGV[10], ARGV[11] == '1', tonumber(ARGV[12])
local health, paces, running, held, line, due, needs, turns = unpack(KEYS)

for _, old in ipairs(redis.call('ZRANGEBYSCORE', running, '-inf', int(now), 'LIMIT', 0, 1000)) do
  local whose = let_go(running, held, old)
  if whose then move_up(line, whose) end
end
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', int(now), 'LIMIT', 0, 1000)) do
  redis.call('ZREM', due, gone)
  redis.call('ZREM', line, gone)
  redis.call('HDEL', needs, gone)
end
local learned = redis.call('HMGET', health, 'cap', 'capend')
if num(learned[1]) > 0 and num(learned[2]) > now then
  if cap > 0 then cap = math.min(cap, num(learned[1])) else cap = num(learned[1]) end
end
local p = redis.call('HMGET', paces, 'r', 't', 'v')
local served = num(p[3])
-- A user who was away does not come back with the turns that they did not use.
redis.call('ZREMRANGEBYSCORE', turns, '-inf', exact(served))
local turn = math.max(num(redis.call('ZSCORE', turns, user)), served)
local function place(more)
  if cap == 0 then return turn end
  return (num(redis.call('HGET', held, user)) + more) * LANE + turn
end
local mine = place(0)
redis.call('ZREM', line, user)
local ahead = redis.call('ZCOUNT', line, '-inf', '(' .. exact(mine))

local wait, reason = 0, ''
local function at_least(us, why) if us > wait then wait, reason = us, why end end
local r, t = math.max(num(p[1]), now), math.max(num(p[2]), now)
local cost = tokens * a_token
if cap > 0 and redis.call('ZCARD', running) + ahead >= cap then at_least(slot_wait, 'concurrency') end
if a_request > 0 then at_least(r + ahead * a_request - now - burst_r, 'requests') end
if a_token > 0 then
  local before = 0
  if ahead > 0 then
    local first = redis.call('ZRANGE', line, 0, math.min(ahead, 16) - 1)
    for _, need in ipairs(redis.call('HMGET', needs, unpack(first))) do before = before + num(need) end
  end
  -- What costs more than the whole burst goes when nothing is owed, and is owed then.
  at_least(t + before * a_token + math.min(cost, burst_t) - now - burst_t, 'tokens')
end

if reason ~= '' then
  redis.call('ZADD', line, exact(mine), user)
  -- Who does not come back in time loses the place, so that nothing is kept for one that is gone.
  redis.call('ZADD', due, 'GT', int(now + wait * 1.25 + 300000), user)
  redis.call('HSET', needs, user, int(tokens))
  redis.call('PEXPIRE', line, ttl)
  redis.call('PEXPIRE', due, ttl)
  redis.call('PEXPIRE', needs, ttl)
  return {0, int(wait), reason}
end
redis.call('ZADD', running, int(now + tonumber(ARGV[9])), lease)
redis.call('HINCRBY', held, user, 1)
redis.call('PEXPIRE', running, ttl)
redis.call('PEXPIRE', held, ttl)
redis.call('HSET', paces, 'r', int(r + a_request), 't', int(t + cost), 'v', exact(turn))
redis.call('PEXPIRE', paces, ttl)
turn = turn + 1
redis.call('ZADD', turns, exact(turn), user)
redis.call('PEXPIRE', turns, ttl)
if others then
  redis.call('ZADD', line, exact(place(0)), user)
  redis.call('ZADD', due, 'GT', int(now + 300000), user)
  redis.call('PEXPIRE', line, ttl)
  redis.call('PEXPIRE', due, ttl)
else
  redis.call('ZREM', due, user)
  redis.call('HDEL', needs, user)
end
return {1, 0, ''}
"""

_LANE: Final = "1e10"
"""A running call moves its user further back than any number of turns does."""


def _script(name: str, body: str) -> Script:
    return Script(name, body.replace("LANE", _LANE), prelude=_PRELUDE.replace("LANE", _LANE))


REPORT: Final = _script("traffic_report", _REPORT)
PROBE: Final = _script("traffic_probe", _PROBE)
RENEW: Final = _script("traffic_renew", _RENEW)
ADMIT: Final = _script("traffic_admit", _ADMIT)
