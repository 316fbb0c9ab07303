"""States of samples in Redis: the store of many hosts. Each method is one Lua script, which Redis runs alone.

A sample is a hash; each state is a sorted set of keys. The score is the order of ingestion, the deadline of a
lease, or the step that trained the sample. The hash is the truth: keys in a set whose hash says otherwise, or is
missing, are taken out of it and named in a warning, whoever put them there or deleted the hash.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from specforge.errors import UserError
from specforge.extras import install_hint
from specforge.files import first_line
from specforge.runtime.control_plane.metadata import STATES, Claim, Entry, Grant, StateError, unusable

logger = logging.getLogger(__name__)

# Every script checks all it was given before it changes anything: Redis does not roll back. What `run` returns goes
# out beside the strangers that were found on the way.
_LUA = (
    """
local space, strangers = KEYS[1], {}
local states = {}
for state in string.gmatch('"""
    + " ".join(STATES)
    + """', '%a+') do states[state] = true end
local function sample(key) return space .. ':sample:' .. key end
local function set(state) return space .. ':' .. state end
local function fields(key, ...)  -- nothing where there is none, or something else has its name
  local found = redis.pcall('HMGET', sample(key), ...)
  return found.err and {} or found
end
local function get(key, name) return fields(key, name)[1] end
local function is_whole(text)
  return text and string.match(text, '^%-?%d+$') and math.abs(tonumber(text)) < 2^53
end
local function state_of(key)  -- false where it is no sample
  local state, seq, tries = unpack(fields(key, 'state', 'seq', 'tries'))
  return states[state] and is_whole(seq) and is_whole(tries) and state
end
local function drop(key)
  for state in pairs(states) do redis.call('ZREM', set(state), key) end
  if redis.call('DEL', sample(key)) == 1 then strangers[#strangers + 1] = key end
end
local function members(state, keys)  -- of a set, those that are samples in this state
  local found = {}
  for _, key in ipairs(keys) do
    if state_of(key) == state then found[#found + 1] = key
    else
      redis.call('ZREM', set(state), key)
      strangers[#strangers + 1] = key
    end
  end
  return found
end
local function all(state) return members(state, redis.call('ZRANGE', set(state), 0, -1)) end
local function up_to(state, score) return members(state, redis.call('ZRANGEBYSCORE', set(state), '-inf', score)) end
local function move(key, to, score)
  redis.call('ZREM', set(get(key, 'state')), key)
  redis.call('ZADD', set(to), score or get(key, 'seq'), key)
  redis.call('HSET', sample(key), 'state', to)
end
local function batched(command, name, words)  -- Lua hands a call some thousands at most
  for i = 1, #words, 1000 do redis.call(command, name, unpack(words, i, math.min(i + 999, #words))) end
end
local function move_all(keys, from, to, scored, ...)  -- what a step waits for, in few calls; `scored`: score, key, ...
  batched('ZREM', set(from), keys)
  batched('ZADD', set(to), scored)
  for _, key in ipairs(keys) do redis.call('HSET', sample(key), 'state', to, ...) end
end
local function give_up(key, reason, max_tries)
  redis.call('HSET', sample(key), 'reason', reason)
  move(key, tonumber(get(key, 'tries')) >= max_tries and 'dead' or 'queued')
end
local function refuse(key)  -- after it was put right where it can be
  local state = state_of(key)
  if not state then drop(key)
  elseif not redis.call('ZSCORE', set(state), key) then
    redis.call('ZADD', set(state), state == 'leased' and 0 or get(key, 'seq'), key)
  end
  return redis.error_reply('STATE ' .. (state or '?') .. ' ' .. cjson.encode(key))  -- one line
end
local function holds(owner, key)
  return state_of(key) == 'leased' and get(key, 'owner') == owner
end
local function run()
"""
)
_END = """
end
local result = run()
if type(result) == 'table' and result.err then return result end
return {result, strangers}
"""
_SCRIPTS = {
    "ingest": """
local new = {}
for i = 1, #ARGV, 2 do
  local key = ARGV[i]
  new[#new + 1] = state_of(key) and 0 or 1
  if new[#new] == 1 then
    if redis.call('EXISTS', sample(key)) == 1 then drop(key) end
    local seq = redis.call('INCR', space .. ':seq')
    redis.call(
      'HSET', sample(key), 'task', ARGV[i + 1], 'state', 'queued', 'seq', seq, 'tries', 0, 'ref', '', 'reason', ''
    )
    redis.call('ZADD', set('queued'), seq, key)
  end
end
return new
""",
    "lease": """
local owner, count, now, deadline, max_tries = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], tonumber(ARGV[5])
for _, key in ipairs(up_to('leased', now)) do
  give_up(key, 'the lease of ' .. (get(key, 'owner') or '?') .. ' expired', max_tries)
end
local grants = {}
if count < 1 then return grants end
for _, key in ipairs(members('queued', redis.call('ZRANGE', set('queued'), 0, count - 1))) do
  grants[#grants + 1] = {key, get(key, 'task') or '', tonumber(get(key, 'tries'))}
  redis.call('HINCRBY', sample(key), 'tries', 1)
  redis.call('HSET', sample(key), 'owner', owner)
  move(key, 'leased', deadline)
end
return grants
""",
    "renew": """
local held = {}
for i = 3, #ARGV do
  held[#held + 1] = 0
  if holds(ARGV[1], ARGV[i]) then
    redis.call('ZADD', set('leased'), ARGV[2], ARGV[i])
    held[#held] = 1
  end
end
return held
""",
    "release": """
local held = {}
for _, key in ipairs(all('leased')) do
  if holds(ARGV[1], key) then
    redis.call('HINCRBY', sample(key), 'tries', -1)
    move(key, 'queued')
    held[#held + 1] = key
  end
end
return held
""",
    "fail": """
local owner, key, tries, reason, max_tries = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
if not state_of(key) then return refuse(key) end
if holds(owner, key) and get(key, 'tries') == tries then give_up(key, reason, max_tries) end
return get(key, 'state')
""",
    "commit": """
for i = 1, #ARGV, 2 do
  if not state_of(ARGV[i]) then return refuse(ARGV[i]) end
end
local new = {}
for i = 1, #ARGV, 2 do
  local state = get(ARGV[i], 'state')
  local fresh = state == 'queued' or state == 'leased' or state == 'dead'
  if fresh then
    redis.call('HSET', sample(ARGV[i]), 'ref', ARGV[i + 1])
    move(ARGV[i], 'committed')
  end
  new[#new + 1] = fresh and 1 or 0
end
return new
""",
    "deliver": """
local refs, scored = {}, {}
for i, key in ipairs(ARGV) do
  local state, seq, ref = unpack(fields(key, 'state', 'seq', 'ref'))
  if (state ~= 'committed' and state ~= 'delivered') or not is_whole(seq) then return refuse(key) end
  refs[i], scored[2 * i - 1], scored[2 * i] = ref or '', seq, key
end
move_all(ARGV, 'committed', 'delivered', scored)
return refs
""",
    "trained": """
local now, keys, scored = ARGV[1], {}, {}
for i = 2, #ARGV do
  local key, state, step = ARGV[i], unpack(fields(ARGV[i], 'state', 'step'))
  if state ~= 'delivered' and (state ~= 'trained' or step ~= now) then return refuse(key) end
  keys[i - 1], scored[2 * i - 3], scored[2 * i - 2] = key, now, key
end
move_all(keys, 'delivered', 'trained', scored, 'step', now)
return 0
""",
    "durable": """
local keys = up_to('trained', ARGV[1])
for _, key in ipairs(keys) do move(key, 'durable', get(key, 'step') or ARGV[1]) end
return keys
""",
    "rewind": """
local keys = all('delivered')
for _, state in ipairs({'trained', 'durable'}) do
  local later = members(state, redis.call('ZRANGEBYSCORE', set(state), '(' .. ARGV[1], '+inf'))
  for _, key in ipairs(later) do keys[#keys + 1] = key end
end
for _, key in ipairs(keys) do move(key, 'committed') end
return keys
""",
    "requeue": """
for _, key in ipairs(ARGV) do
  local state = state_of(key)
  if not state or state == 'trained' or state == 'durable' then return refuse(key) end
end
for _, key in ipairs(ARGV) do
  local state = get(key, 'state')
  if state ~= 'queued' and state ~= 'leased' then
    redis.call('HSET', sample(key), 'ref', '', 'tries', 0)
    move(key, 'queued')
  end
end
return 0
""",
    "forget": """
for _, key in ipairs(ARGV) do
  local state = state_of(key)
  if state then redis.call('ZREM', set(state), key) end
  redis.call('DEL', sample(key))
end
return 0
""",
    "refs": """
local refs = {}
for i, key in ipairs(ARGV) do refs[i] = get(key, 'ref') or '' end
return refs
""",
    "entries": """
local found = {}
for _, state in ipairs(ARGV) do
  for _, key in ipairs(all(state)) do
    local seq, ref, tries, reason = unpack(fields(key, 'seq', 'ref', 'tries', 'reason'))
    local deadline = state == 'leased' and redis.call('ZSCORE', set(state), key) or '0'
    found[#found + 1] = {tonumber(seq), key, state, ref or '', tonumber(tries), reason or '', deadline}
  end
end
return found
""",
    "counts": """
local counts = {}
for i, state in ipairs(ARGV) do counts[i] = redis.call('ZCARD', set(state)) end
return counts
""",
    "claim": """
local holder, now, deadline, instead_of = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local name = space .. ':trainer'
local found = redis.pcall('HMGET', name, 'holder', 'deadline')
if found.err then redis.call('DEL', name) end  -- something else has its name
local present, ends = unpack(found)
if present and present ~= holder and present ~= instead_of and (tonumber(ends) or 0) > now then
  return {present, ends}
end
redis.call('HSET', name, 'holder', holder, 'deadline', deadline)
return {holder, deadline}
""",
    "resign": """
if redis.pcall('HGET', space .. ':trainer', 'holder') == ARGV[1] then redis.call('DEL', space .. ':trainer') end
return 0
""",
}
_MEANINGS = {  # of errors whose text redis-py shortens, or which says too little
    "OutOfMemoryError": "its memory is full",
    "ReadOnlyError": "it is a replica, which can only be read; give the address of its master",
    "NoPermissionError": "this user may not do what is needed",
    "AuthenticationError": "it wants a password, or another one",
    "BusyLoadingError": "it is still reading its data",
    "MovedError": "it is a node of a cluster, and this run's keys are on another",
    "AskError": "it is a node of a cluster, and this run's keys are being moved to another",
    "ClusterCrossSlotError": "it is a node of a cluster, which cannot hold a run's keys together",
    "ClusterDownError": "its cluster is down",
    "MasterDownError": "it is a replica that has lost its master",
}

_RETRIES = 15  # with waits that grow to a second: ten seconds


class RedisMetadataStore:
    """See :class:`~specforge.runtime.control_plane.metadata.MetadataStore`.

    Args:
        url: ``redis://host:port/0``, or ``rediss://`` for TLS.
        namespace: prefix of every key; runs that share a server have different ones.
        username: for servers with access control lists.
        password: where the server asks for one.
        ca_file: certificates that sign the server's; the system's by default.
        cert_file: certificate of this client, where the server asks for one.
        key_file: its key.
        timeout: seconds to wait for an answer.

    Raises:
        UserError: the package is missing, or the server does not answer or let us in.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "specforge",
        username: str | None = None,
        password: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        try:
            import redis
            from redis.backoff import ExponentialBackoff, NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise UserError(f"metadata in Redis needs the package redis: {install_hint('redis')}") from error
        tls = {"ssl_ca_certs": ca_file, "ssl_certfile": cert_file, "ssl_keyfile": key_file}
        options: dict[str, Any] = {"username": username, "password": password}
        if url.startswith("rediss://"):
            options |= tls
        elif any(tls.values()):
            raise UserError("metadata in Redis: certificates are for TLS; write the address as rediss://")
        self._errors = redis.exceptions
        # Without the password that an address may hold.
        self._where = url.rpartition("//")[2].rpartition("@")[2]
        try:
            self._client = redis.Redis.from_url(
                url,
                decode_responses=True,
                encoding_errors="surrogateescape",
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                **{name: value for name, value in options.items() if value is not None},
            )
            self._client.set_retry(Retry(NoBackoff(), 0))  # a wrong address is said at once
            self.namespace = "{" + namespace + "}"  # braces keep a cluster's keys on one node
            self._scripts = {name: self._client.register_script(_LUA + body + _END) for name, body in _SCRIPTS.items()}
            self._scripts["counts"](keys=[self.namespace], args=STATES)
            self._check_eviction()
        except (redis.exceptions.RedisError, ValueError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"metadata in Redis at {self._where}: {_meaning(error)}") from error
        # A server that is started again in the middle of a run is waited for. What it did before it died is done
        # twice then, which every script bears.
        waits = ExponentialBackoff(cap=1.0, base=0.01)
        self._client.set_retry(Retry(waits, _RETRIES, (redis.exceptions.ConnectionError,)))

    def _check_eviction(self) -> None:
        """Refuse a server that deletes samples when its memory is full.

        Raises:
            UserError: it does.
        """
        try:
            info = self._client.info("memory")
        except self._errors.ResponseError:  # this user may not ask; what is deleted is missed later
            return
        policy, limit = str(info.get("maxmemory_policy")), info.get("maxmemory")
        if policy.startswith("allkeys") and limit:
            raise UserError(
                f"metadata in Redis at {self._where}: it deletes keys when its memory of {limit:,} bytes is full "
                f"(maxmemory-policy {policy}); set maxmemory-policy to noeviction"
            )

    def ingest(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """See :class:`MetadataStore`."""
        return [new == 1 for new in self._run("ingest", "ingested", *(x for item in items for x in item))]

    def lease(self, owner: str, count: int, now: float, deadline: float, max_tries: int) -> list[Grant]:
        """See :class:`MetadataStore`."""
        found = self._run("lease", "leased", owner, count, repr(now), repr(deadline), max_tries)
        return [Grant(*row) for row in found]

    def renew(self, owner: str, keys: Sequence[str], deadline: float) -> list[bool]:
        """See :class:`MetadataStore`."""
        return [held == 1 for held in self._run("renew", "renewed", owner, repr(deadline), *keys)]

    def release(self, owner: str) -> list[str]:
        """See :class:`MetadataStore`."""
        return list(self._run("release", "released", owner))

    def fail(self, owner: str, key: str, attempt: int, reason: str, max_tries: int) -> str:
        """See :class:`MetadataStore`."""
        return str(self._run("fail", "failed", owner, key, attempt + 1, reason, max_tries))

    def commit(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """See :class:`MetadataStore`."""
        return [new == 1 for new in self._run("commit", "committed", *(x for item in items for x in item))]

    def deliver(self, keys: Sequence[str]) -> list[str]:
        """See :class:`MetadataStore`."""
        return list(self._run("deliver", "delivered", *keys))

    def mark_trained(self, keys: Sequence[str], step: int) -> None:
        """See :class:`MetadataStore`."""
        self._run("trained", "trained", step, *keys)

    def mark_durable(self, step: int) -> list[str]:
        """See :class:`MetadataStore`."""
        return list(self._run("durable", "durable", step))

    def rewind(self, step: int) -> list[str]:
        """See :class:`MetadataStore`."""
        return list(self._run("rewind", "delivered again", step))

    def requeue(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        self._run("requeue", "queued again", *keys)

    def forget(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        self._run("forget", "forgotten", *keys)

    def refs(self, keys: Sequence[str]) -> list[str]:
        """See :class:`MetadataStore`."""
        return list(self._run("refs", "read", *keys))

    def entries(self, states: Collection[str]) -> Iterator[Entry]:
        """See :class:`MetadataStore`."""
        rows = sorted(self._run("entries", "read", *states))
        return iter(
            [
                Entry(key, state, ref, tries, reason, float(deadline))
                for _, key, state, ref, tries, reason, deadline in rows
            ]
        )

    def counts(self) -> dict[str, int]:
        """See :class:`MetadataStore`."""
        return dict(zip(STATES, self._run("counts", "counted", *STATES), strict=True))

    def claim(self, holder: str, now: float, deadline: float, instead_of: str = "") -> Claim:
        """See :class:`MetadataStore`."""
        present, ends = self._run("claim", "claimed", holder, repr(now), repr(deadline), instead_of)
        return Claim(present, float(ends))

    def resign(self, holder: str) -> None:
        """See :class:`MetadataStore`."""
        self._run("resign", "resigned", holder)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _run(self, script: str, action: str, *arguments: Any) -> Any:
        try:
            result, strangers = self._scripts[script](keys=[self.namespace], args=arguments)
        except (self._errors.RedisError, ValueError, OSError) as error:
            kind, _, rest = str(error).partition(" ")
            if isinstance(error, self._errors.ResponseError) and kind == "STATE":
                state, _, key = rest.partition(" ")
                raise StateError(json.loads(key), "" if state == "?" else state, action) from error
            raise unusable(f"in Redis at {self._where}", _meaning(error)) from error
        if strangers:
            logger.warning(
                "metadata in Redis at %s: left out %d entries that are no samples any more, or never were: %s",
                self._where,
                len(strangers),
                ", ".join(map(repr, strangers[:3])),
            )
        return result


def _meaning(error: Exception) -> str:
    """What an error of redis-py means, in one line, without the place in a script."""
    text = first_line(error).partition(" script: ")[0].rstrip(".")
    if "WRONGTYPE" in text:
        return "something else than a run is stored under this namespace; name another one behind #"
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        return f"its address has an option that is not known: {unknown.group(1)}"
    kind = "NoPermissionError" if text.startswith("The user executing the script can't") else type(error).__name__
    meaning = _MEANINGS.get(kind)
    return f"{meaning} ({text})" if meaning else text
