"""The scripts that own a batch's state. Each is one atomic act on one batch's keys, and may be repeated.

``KEYS`` are always the batch, its lines, the counted bits, the list of ended lines, and the lines that end together
with another.

The batch's fields: ``head`` (JSON, never changed), ``state``, ``lines`` (uploaded), ``total`` (set when sealed),
``fed`` (lines below it may have a job), ``sent`` (lines below it have one), ``linked`` (fed lines that wait for an
equal one), ``cut`` (set by a cancellation: lines from there on never run), ``feeder`` (who feeds it), ``created``,
``deadline``, ``until``, ``ended`` (ms), ``keep`` (ms), and the counts.

A line is counted once: by its bit. Lines at or behind ``cut`` were counted all at once, when it was set.
"""

from __future__ import annotations

from typing import Final

from promptmill.store.scripts import Script

LINKED_MAX: Final = 2_000
"""How many lines may wait for one equal line: all of them end within one script."""
LINKED, COUNT_NOW, LINKS_FULL, NOT_YOURS = 1, 0, -1, -2
"""What :data:`LINK` answers."""

_PRELUDE = """
local B, LINES, COUNTED, ENDED, SAME = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
local function num(field) return tonumber(redis.call('HGET', B, field) or '0') end
local function whole(n) return string.format('%.0f', n) end
local function over(state) return state == 'completed' or state == 'cancelled' or state == 'expired' end
local function live()
  local at = redis.call('HGET', B, 'until')
  for _, key in ipairs(KEYS) do redis.call('PEXPIREAT', key, at) end
end
-- The batch ends with its last line. Answers its state.
local function settle()
  local state, total = unpack(redis.call('HMGET', B, 'state', 'total'))
  if over(state) or not total then return state end
  local done = 0
  for _, n in ipairs(redis.call('HMGET', B, 'succeeded', 'failed', 'cancelled', 'expired')) do
    done = done + tonumber(n or '0')
  end
  if done < tonumber(total) then return state end
  local now = now_ms()
  if state == 'cancelling' then state = redis.call('HGET', B, 'ending') else state = 'completed' end
  redis.call('HSET', B, 'state', state, 'ended', whole(now), 'until', whole(now + num('keep')))
  live()
  return state
end
"""


def _script(name: str, body: str) -> Script:
    return Script(name, body, prelude=_PRELUDE)


# ARGV: head, expires_ms, keep_ms -> 'created', or 'exists' and the head that it has
CREATE: Final = _script(
    "batch_create",
    """
local head = redis.call('HGET', B, 'head')
if head then return {'exists', head} end
local now = now_ms()
local deadline = now + tonumber(ARGV[2])
redis.call('HSET', B, 'head', ARGV[1], 'state', 'uploading', 'lines', 0, 'fed', 0, 'sent', 0, 'linked', 0,
           'created', whole(now), 'deadline', whole(deadline), 'keep', ARGV[3],
           -- A day for whoever is to end it.
           'until', whole(deadline + tonumber(ARGV[3]) + 86400000))
live()
return {'created'}
""",
)

# ARGV: chunk, index of its first line, how many lines, data -> 'ok', 'missing', 'gap', 'sealed' or a later state; lines
ADD: Final = _script(
    "batch_add",
    """
local state = redis.call('HGET', B, 'state')
if not state then return {'missing', 0} end
local lines, first = num('lines'), tonumber(ARGV[2])
local new = first + tonumber(ARGV[3])
if new <= lines then return {'ok', lines} end
if state == 'running' then return {'sealed', lines} end
if state ~= 'uploading' then return {state, lines} end
if first > lines then return {'gap', lines} end
redis.call('HSET', LINES, ARGV[1], ARGV[4])
redis.call('HSET', B, 'lines', new)
live()
return {'ok', new}
""",
)

# ARGV: total -> 'ok', 'missing' or 'wrong'; lines
SEAL: Final = _script(
    "batch_seal",
    """
local state, total = unpack(redis.call('HMGET', B, 'state', 'total'))
if not state then return {'missing', 0} end
local lines = num('lines')
if tonumber(ARGV[1]) ~= lines then return {'wrong', lines} end
if state == 'uploading' then
  redis.call('HSET', B, 'state', 'running', 'total', lines)
  settle()
end
return {'ok', lines}
""",
)

# ARGV: token -> the state; '' where there is no batch
TAKE: Final = _script(
    "batch_take",
    """
local state = redis.call('HGET', B, 'state')
if not state then return '' end
redis.call('HSET', B, 'feeder', ARGV[1])
return state
""",
)

# ARGV: token, from, to -> 1 where these lines may now be given to the queue
RESERVE: Final = _script(
    "batch_reserve",
    """
local f = redis.call('HMGET', B, 'state', 'feeder', 'fed', 'sent', 'lines')
if f[2] ~= ARGV[1] or f[3] ~= ARGV[2] or f[4] ~= ARGV[2] or tonumber(ARGV[3]) > tonumber(f[5]) then return 0 end
if f[1] ~= 'uploading' and f[1] ~= 'running' then return 0 end
redis.call('HSET', B, 'fed', ARGV[3])
return 1
""",
)

# ARGV: token, to -> 1 where it is noted that every line below has its job
SENT: Final = _script(
    "batch_sent",
    """
if redis.call('HGET', B, 'feeder') ~= ARGV[1] then return 0 end
if num('sent') < tonumber(ARGV[2]) then redis.call('HSET', B, 'sent', ARGV[2]) end
return 1
""",
)

# ARGV: token, then index of the first line and of an equal one, in turn -> LINKED, COUNT_NOW or LINKS_FULL for each
LINK: Final = _script(
    "batch_link",
    """
local out, lists, new = {}, {}, 0
if redis.call('HGET', B, 'feeder') ~= ARGV[1] then
  for i = 2, #ARGV, 2 do out[#out + 1] = -2 end
  return out
end
for i = 2, #ARGV, 2 do
  local first, index = ARGV[i], ARGV[i + 1]
  if redis.call('GETBIT', COUNTED, index) == 1 then
    out[#out + 1] = 1
  elseif redis.call('GETBIT', COUNTED, first) == 1 then
    out[#out + 1] = 0
  else
    local list = lists[first]
    if not list then
      local raw = redis.call('HGET', SAME, first)
      list = raw and cjson.decode(raw) or {}
      lists[first] = list
    end
    if #list >= LINKED_MAX then
      out[#out + 1] = -1
    else
      list[#list + 1] = tonumber(index)
      redis.call('SETBIT', COUNTED, index, 1)
      new = new + 1
      out[#out + 1] = 1
    end
  end
end
for first, list in pairs(lists) do
  if #list > 0 then redis.call('HSET', SAME, first, cjson.encode(list)) end
end
redis.call('HINCRBY', B, 'linked', new)
live()
return out
""".replace("LINKED_MAX", str(LINKED_MAX)),
)

# ARGV: a JSON list for each line: index, state, input, output, cache read and cache write tokens, cost in nano dollars,
#       1 where tokens are estimated, 1 where the cost is not known, code, model, index of the equal line (-1: none)
# -> how many are counted now that were not; the batch's state, '' where it is gone
COUNT: Final = _script(
    "batch_count",
    """
local state, cut = unpack(redis.call('HMGET', B, 'state', 'cut'))
if not state then return {0, ''} end
if over(state) then return {0, state} end
local sums, ended, new = {}, {}, 0
local function add(field, n) if n ~= 0 then sums[field] = (sums[field] or 0) + n end end
for i = 1, #ARGV do
  local line = cjson.decode(ARGV[i])
  local index = whole(line[1])
  if not (cut and line[1] >= tonumber(cut)) and redis.call('SETBIT', COUNTED, index, 1) == 0 then
    local n = 1
    ended[#ended + 1] = line[12] < 0 and index or (index .. ':' .. whole(line[12]))
    local raw = redis.call('HGET', SAME, index)
    if raw then
      for _, later in ipairs(cjson.decode(raw)) do
        ended[#ended + 1] = whole(later) .. ':' .. index
        n = n + 1
      end
      add('linked', 1 - n)
      redis.call('HDEL', SAME, index)
    end
    add(line[2], n)
    add('input_tokens', line[3])
    add('output_tokens', line[4])
    add('cache_read_tokens', line[5])
    add('cache_write_tokens', line[6])
    add('cost_nano', line[7])
    add('estimated', line[8])
    add('unpriced', line[9])
    if line[10] ~= '' then add('code:' .. line[10], n) end
    if line[11] ~= '' then add('model:' .. line[11], n) end
    new = new + n
  end
end
for field, n in pairs(sums) do redis.call('HINCRBY', B, field, whole(n)) end
for i = 1, #ended, 1000 do redis.call('RPUSH', ENDED, unpack(ended, i, math.min(i + 999, #ended))) end
live()
return {new, settle()}
""",
)

# ARGV: 'cancelled' or 'expired' -> the state; 'early' where it may not expire yet; '' where there is no batch
STOP: Final = _script(
    "batch_stop",
    """
local state = redis.call('HGET', B, 'state')
if not state then return '' end
if over(state) or state == 'cancelling' then return state end
if ARGV[1] == 'expired' and now_ms() < num('deadline') then return 'early' end
local fed, lines = num('fed'), num('lines')
redis.call('HSET', B, 'state', 'cancelling', 'ending', ARGV[1], 'cut', fed, 'total', lines)
if lines > fed then
  redis.call('HINCRBY', B, ARGV[1], lines - fed)
  redis.call('HINCRBY', B, 'code:' .. ARGV[1], lines - fed)
end
return settle()
""",
)

# ARGV: how far the jobs of a batch that ended were let go -> 1, 0 where it is gone
FREED: Final = _script(
    "batch_freed",
    """
if redis.call('EXISTS', B) == 0 then return 0 end
redis.call('HSET', B, 'freed', ARGV[1])
return 1
""",
)

# ARGV: id for the batch that runs again what failed -> the id that it has, once and for all; '' where it has not ended
RETRY: Final = _script(
    "batch_retry",
    """
local state = redis.call('HGET', B, 'state')
if not state or not over(state) then return '' end
redis.call('HSETNX', B, 'retry', ARGV[1])
return redis.call('HGET', B, 'retry')
""",
)

# KEYS: lease. ARGV: token, ttl ms -> 1 where the lease is held with this token
LEASE: Final = Script(
    "feeder_lease",
    """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""",
    prelude="",
)

# KEYS: lease. ARGV: token -> 1 where it was held with it, and is free now
RELEASE: Final = Script(
    "feeder_release",
    """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""",
    prelude="",
)

ALL: Final = (CREATE, ADD, SEAL, TAKE, RESERVE, SENT, LINK, COUNT, STOP, FREED, RETRY, LEASE, RELEASE)
