"""The scripts of the ledger. What they write can be written again without effect."""

from __future__ import annotations

from typing import Final

from promptmill.store.scripts import Script

# KEYS: ledger, sums. ARGV: ttl ms, then field and entry (JSON) of each attempt. Answers how many are new.
# The sums are made from the entry here, so that they cannot say anything else than it does.
BOOK: Final = Script(
    "book",
    """
local function add(e, sign)
  local cell = cjson.encode({e.user, e.model, e.backend, e.role})
  local function inc(field, n)
    if n ~= 0 then redis.call('HINCRBY', KEYS[2], field, string.format('%.0f', sign * n)) end
  end
  local function flag(metric, holds) if holds then inc(metric .. ':' .. cell, 1) end end
  local tokens = 0
  for _, metric in ipairs({'in', 'out', 'cache_read', 'cache_write'}) do
    inc(metric .. ':' .. cell, e[metric])
    tokens = tokens + e[metric]
  end
  inc('cost:' .. cell, e.cost)
  flag('attempts', true)
  flag('failed', e.outcome ~= 'succeeded')
  flag('estimated', e.estimated)
  flag('unpriced', e.unpriced)
  inc('user_tokens:' .. e.user, tokens)
  inc('user_cost:' .. e.user, e.cost)
end
local new = 0
for i = 2, #ARGV, 2 do
  local entry = cjson.decode(ARGV[i + 1])
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 1 then
    add(entry, 1)
    new = new + 1
  elseif not entry.presumed then
    local old = cjson.decode(redis.call('HGET', KEYS[1], ARGV[i]))
    if old.presumed then
      add(old, -1)
      redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
      add(entry, 1)
      new = new + 1
    end
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return new
""",
    prelude="",
)

# KEYS: record. ARGV: claim token, field, attempt (JSON). Only while the claim holds, so that no record is made anew;
# else -1.
ASKING: Final = """
if redis.call('HGET', KEYS[1], 'claim') ~= ARGV[1] then return -1 end
local had = redis.call('HGET', KEYS[1], ARGV[2])
if had and (cjson.decode(had).attempt or 0) > (cjson.decode(ARGV[3]).attempt or 0) then return 0 end
return redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
"""

# KEYS: unbooked. ARGV: job and score, in turn. What has another score by now was told of anew, and stays.
FORGET: Final = Script(
    "forget",
    """
local gone = 0
for i = 1, #ARGV, 2 do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score and tonumber(score) == tonumber(ARGV[i + 1]) then
    gone = gone + redis.call('ZREM', KEYS[1], ARGV[i])
  end
end
return gone
""",
    prelude="",
)

# KEYS: record. ARGV: try (JSON; claim cut to eight characters). Answers 'added', 'known' or 'missing'.
LATE_TRY: Final = Script(
    "late_try",
    """
local rec = KEYS[1]
if redis.call('HEXISTS', rec, 'st') == 0 then return 'missing' end
local function list(field)
  local raw = redis.call('HGET', rec, field)
  if raw and raw ~= '[]' then return cjson.decode(raw) end
  return {}
end
local function presumed(try) return try.text_bytes and not try.usage end
local new = cjson.decode(ARGV[1])
local function same_claim(try) return try.claim and string.sub(try.claim, 1, 8) == new.claim end
for _, try in ipairs(list('tries')) do
  if same_claim(try) then
    if presumed(try) then
      if presumed(new) then return 'known' end
    elseif try.attempt == new.attempt then
      return 'known'
    end
  end
end
local late = list('late')
local place = #late + 1
for i, try in ipairs(late) do
  if same_claim(try) then
    if presumed(try) then
      if presumed(new) then return 'known' end
      if new.lost then
        place = i
        -- It was booked on that day, and is to take that entry's place.
        new.day = try.day
      end
    elseif try.attempt == new.attempt then
      return 'known'
    elseif try.lost then
      if presumed(new) then return 'known' end
      new.lost = nil
    end
  end
end
late[place] = new
redis.call('HSET', rec, 'late', cjson.encode(late))
return 'added'
""",
    prelude="",
)
