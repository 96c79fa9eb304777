"""The scripts that own a job's state. Each is one atomic act on one job's keys.

``KEYS`` are always the record and the log of one job; its channel is no key, and while a Redis Cluster moves a slot it
refuses what names keys that are not there. A transition (submit, claim, requeue, stop, finish)
sets a new epoch, ``max(previous + 1, Redis TIME in ms)``, and appends its own event ``<epoch>-1``: from then on the log
refuses every entry of an older epoch, and a number lost in a failover is never used twice. Each takes a token of its
caller and, repeated with it, returns the earlier result, so a lost reply is harmless.

The record's fields: ``head`` (JSON, never changed), ``request`` (JSON, never changed), ``st`` (JSON, what changes),
``claim`` (the token of the running attempt; absent unless running), ``tries`` (JSON list of ended attempts), ``end``
(JSON, written once with the end).
"""

from __future__ import annotations

import hashlib
from typing import Final

LIVE_PAYLOAD_MAX_BYTES: Final = 8 * 1024
"""Above this the channel carries the id alone and readers fetch the log: Redis drops subscribers whose buffer grows."""

FENCED: Final = -1
GONE: Final = -2

_TEXT_FROM_LOG_MAX_EVENTS: Final = 20_000
"""A longer log would hold the server up for too long; its text is then not stored with a cancel."""

_PRELUDE = """
local rec, log = KEYS[1], KEYS[2]
local chan = string.sub(rec, 1, -5)
local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
local function load()
  local raw = redis.call('HGET', rec, 'st')
  if raw then return cjson.decode(raw) end
  return nil
end
local function advance(st)
  local now = now_ms()
  local epoch = now
  local previous = tonumber(st.epoch or '0')
  if epoch <= previous then epoch = previous + 1 end
  st.epoch = string.format('%.0f', epoch)
  return now
end
local function publish(id, payload)
  if #payload > LIVE_MAX then return redis.call('PUBLISH', chan, id) end
  return redis.call('PUBLISH', chan, id .. ' ' .. payload)
end
local function add(st, n, payload)
  local id = st.epoch .. '-' .. n
  if redis.call('XADD', log, 'NOMKSTREAM', id, 'e', payload) then publish(id, payload) end
end
local function ended(state)
  return state == 'succeeded' or state == 'failed' or state == 'cancelled' or state == 'expired'
end
local function save(st)
  redis.call('HSET', rec, 'st', cjson.encode(st))
end
local function keep(st)
  redis.call('PEXPIRE', rec, st.ttl)
  redis.call('PEXPIRE', log, st.ttl)
end
-- What readers saw stays readable: the tokens since the last restart, joined, are the stored text of every end.
local function with_text(result)
  if redis.call('XLEN', log) > TEXT_MAX then
    local packed = cjson.decode(result)
    packed.untold = true
    return cjson.encode(packed)
  end
  local parts = {}
  for _, entry in ipairs(redis.call('XRANGE', log, '-', '+')) do
    local payload = entry[2][2]
    if string.sub(payload, 1, 15) == '{"type":"token"' then
      parts[#parts + 1] = cjson.decode(payload).text
    elseif string.sub(payload, 1, 17) == '{"type":"restart"' then
      parts = {}
    end
  end
  if #parts == 0 then return result end
  local packed = cjson.decode(result)
  packed.text = table.concat(parts)
  return cjson.encode(packed)
end
-- How many bytes of text the attempt of an epoch has told, without the events' own; restarts within it do not count.
local function tokens_since(epoch)
  local bytes = 0
  for _, entry in ipairs(redis.call('XRANGE', log, epoch .. '-2', epoch, 'COUNT', TEXT_MAX)) do
    local payload = entry[2][2]
    if string.sub(payload, 1, 15) == '{"type":"token"' then bytes = bytes + #payload - 25 end
  end
  return bytes
end
local function finish(st, state, now, event, result, log_ttl)
  st.state = state
  st.finished = now
  -- A late reader that has everything up to here lacks the end event only.
  local tail = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  if tail then st.last = tail[1] end
  add(st, 1, event)
  redis.call('HDEL', rec, 'claim')
  redis.call('HSET', rec, 'end', result)
  save(st)
  redis.call('PEXPIRE', rec, st.keep)
  redis.call('PEXPIRE', log, math.min(tonumber(log_ttl), st.keep))
end
""".replace("LIVE_MAX", str(LIVE_PAYLOAD_MAX_BYTES)).replace("TEXT_MAX", str(_TEXT_FROM_LOG_MAX_EVENTS))

# ARGV: token, head, request, event, life_ms, retention_ms, queue_ms
_SUBMIT = """
local st = load()
if st then return {'exists', st.epoch, st.state} end
st = {state = 'queued', sub = ARGV[1], attempts = 0, crashes = 0,
      ttl = tonumber(ARGV[5]) + tonumber(ARGV[6]), keep = tonumber(ARGV[6]), wait = tonumber(ARGV[7])}
local now = advance(st)
st.created = now
st.queued = now
st.deadline = now + st.wait
redis.call('XADD', log, st.epoch .. '-1', 'e', ARGV[4])
redis.call('HSET', rec, 'head', ARGV[2], 'request', ARGV[3], 'st', cjson.encode(st))
keep(st)
publish(st.epoch .. '-1', ARGV[4])
return {'created', st.epoch, st.state}
"""

# ARGV: token, worker, event, 'alone' where the claim is made in quarantine
_CLAIM = """
local st = load()
if not st then return {'missing'} end
local fields = {'head', 'request', 'st', 'tries'}
if st.state == 'running' and st.claim == ARGV[1] then
  return {'ok', st.epoch, redis.call('HMGET', rec, unpack(fields))}
end
if st.state ~= 'queued' then return {'not_queued', st.state} end
local now = now_ms()
if now >= st.deadline then return {'expired'} end
if st.alone and ARGV[4] ~= 'alone' then return {'alone'} end
if st.not_before and now < st.not_before then return {'early', tostring(st.not_before - now)} end
advance(st)
st.state = 'running'
st.claim = ARGV[1]
st.worker = ARGV[2]
st.attempts = st.attempts + 1
if not st.started then st.started = now end
redis.call('HSET', rec, 'claim', ARGV[1])
save(st)
add(st, 1, ARGV[3])
keep(st)
return {'ok', st.epoch, redis.call('HMGET', rec, unpack(fields))}
"""

# ARGV: claim token, epoch, first n, payload ... -> receivers of the last one, or FENCED, or GONE
_APPEND = """
if redis.call('HGET', rec, 'claim') ~= ARGV[1] then return -1 end
local n = tonumber(ARGV[3])
local receivers = 0
for i = 4, #ARGV do
  local id = ARGV[2] .. '-' .. (n + i - 4)
  local added = redis.pcall('XADD', log, 'NOMKSTREAM', id, 'e', ARGV[i])
  if type(added) == 'table' and added.err then
    -- An id that is there already was added, and published, by an earlier call whose reply was lost.
    if not string.find(tostring(added.err), 'equal or smaller', 1, true) then return added end
  elseif not added then
    return -2
  else
    receivers = publish(id, ARGV[i])
  end
end
return receivers
"""

# ARGV: claim token, state, event, end, tries, log_ttl_ms
_FINISH = """
local st = load()
if not st then return {'missing'} end
if st.fin == ARGV[1] then return {'ok', st.epoch} end
if st.state ~= 'running' or st.claim ~= ARGV[1] then return {'fenced', st.state} end
local now = advance(st)
st.fin = ARGV[1]
redis.call('HSET', rec, 'tries', ARGV[5])
finish(st, ARGV[2], now, ARGV[3], ARGV[4], ARGV[6])
return {'ok', st.epoch}
"""

# ARGV: token, state, event, end, log_ttl_ms, control channel prefix
_STOP = """
local st = load()
if not st then return {'missing'} end
if st.tok == ARGV[1] then return {'ok', st.epoch} end
if ended(st.state) then return {'ended', st.state} end
if ARGV[2] == 'expired' and (st.state ~= 'queued' or now_ms() < st.deadline) then return {'early', st.state} end
local worker, claim, result = nil, st.claim, ARGV[4]
if st.state == 'running' then worker = st.worker end
if st.started then result = with_text(result) end
local now = advance(st)
st.tok = ARGV[1]
finish(st, ARGV[2], now, ARGV[3], result, ARGV[5])
if worker then redis.call('PUBLISH', ARGV[6] .. worker, claim) end
return {'ok', st.epoch}
"""

# ARGV: mode ('dead' | 'handback'), expected (worker | claim token), event, restart event, max crashes, try,
#       error event, error end, log_ttl_ms, token, queue ('' leaves it), tries ('' leaves them; given, this was an
#       attempt), chain ('' leaves it), ms to wait ('' at once), 'poisoned' where the job's own process was seen to die,
#       crashes after which it runs alone, retention in ms of a job that is given up
_REQUEUE = """
local st = load()
if not st then return {'missing'} end
if st.req == ARGV[10] then
  if ended(st.state) then return {'failed', st.epoch} end
  return {'queued', st.epoch}
end
local mine = st.state == 'running'
if ARGV[1] == 'dead' then mine = mine and st.worker == ARGV[2] else mine = mine and st.claim == ARGV[2] end
if not mine then return {'not_running', st.state} end
local tries = {}
local raw = redis.call('HGET', rec, 'tries')
if raw and raw ~= '[]' then tries = cjson.decode(raw) end
local lost_epoch, lost_bytes = st.epoch, tokens_since(st.epoch)
local void = lost_bytes > 0
local now = advance(st)
st.req = ARGV[10]
if ARGV[1] == 'dead' then
  st.crashes = st.crashes + 1
  local try = cjson.decode(ARGV[6])
  try.attempt = st.attempts
  try.epoch = lost_epoch
  try.claim = string.sub(st.claim, 1, 8)
  try.ended_ms = now
  try.text_bytes = lost_bytes
  table.insert(tries, try)
  redis.call('HSET', rec, 'tries', cjson.encode(tries))
elseif ARGV[12] ~= '' then
  redis.call('HSET', rec, 'tries', ARGV[12])
else
  st.attempts = st.attempts - 1
end
if ARGV[15] == 'poisoned' or st.crashes >= tonumber(ARGV[5]) then
  st.keep = math.max(st.keep, tonumber(ARGV[17]))
  finish(st, 'failed', now, ARGV[7], with_text(ARGV[8]), ARGV[9])
  return {'failed', st.epoch}
end
st.state = 'queued'
if st.crashes >= tonumber(ARGV[16]) then st.alone = true end
if ARGV[11] ~= '' then st.queue = ARGV[11] end
if ARGV[13] ~= '' then st.chain = cjson.decode(ARGV[13]) end
st.not_before = nil
st.queued = now
if ARGV[14] == '' then
  st.deadline = now + st.wait
  st.handed = ARGV[13] ~= '' or nil
else
  -- It only waits: its time in the queue goes on, without the time that it ran. An epoch is about when it was claimed.
  st.deadline = st.deadline + math.max(0, now - tonumber(lost_epoch))
  st.handed = nil
  st.not_before = math.min(now + tonumber(ARGV[14]), st.deadline)
end
st.claim = nil
st.worker = nil
redis.call('HDEL', rec, 'claim')
save(st)
add(st, 1, ARGV[3])
if void then add(st, 2, ARGV[4]) end
keep(st)
return {'queued', st.epoch}
"""


class Script:
    """A script's source and its SHA-1, as EVALSHA wants it."""

    __slots__ = ("name", "sha", "source")

    def __init__(self, name: str, body: str, *, prelude: str = _PRELUDE) -> None:
        self.name = name
        self.source = prelude + body
        # Redis names scripts by SHA-1; nothing here is a secret.
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    def __repr__(self) -> str:
        return f"Script({self.name!r})"

    def sharded(self) -> Script:
        """The same script for a Redis Cluster, where a job's events stay with the node that has its log."""
        return Script(self.name, self.source.replace("'PUBLISH', chan,", "'SPUBLISH', chan,"), prelude="")


SUBMIT: Final = Script("submit", _SUBMIT)
CLAIM: Final = Script("claim", _CLAIM)
APPEND: Final = Script("append", _APPEND)
FINISH: Final = Script("finish", _FINISH)
STOP: Final = Script("stop", _STOP)
REQUEUE: Final = Script("requeue", _REQUEUE)

ALL: Final = (SUBMIT, CLAIM, APPEND, FINISH, STOP, REQUEUE)
