"""States of samples in Redis: the store of many hosts. Each method is one Lua script, which Redis runs alone.

A sample is a hash; each state is a sorted set of keys. The score is the order of ingestion, the deadline of a
lease, or the step that trained the sample.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from specforge.errors import UserError
from specforge.runtime.control_plane.metadata import STATES, Entry, Grant, StateError, unusable

# Every script checks all it was given before it changes anything: Redis does not roll back.
_LUA = """
local space = KEYS[1]
local function sample(key) return space .. ':sample:' .. key end
local function set(state) return space .. ':' .. state end
local function get(key, name) return redis.call('HGET', sample(key), name) end
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
local function refuse(key)
  return redis.error_reply('STATE ' .. (get(key, 'state') or '?') .. ' ' .. cjson.encode(key))  -- one line
end
local function holds(owner, key)
  return get(key, 'state') == 'leased' and get(key, 'owner') == owner
end
"""
_SCRIPTS = {
    "ingest": """
local new = {}
for i = 1, #ARGV, 2 do
  new[#new + 1] = redis.call('HSETNX', sample(ARGV[i]), 'task', ARGV[i + 1])
  if new[#new] == 1 then
    local seq = redis.call('INCR', space .. ':seq')
    redis.call('HSET', sample(ARGV[i]), 'state', 'queued', 'seq', seq, 'tries', 0, 'ref', '', 'reason', '')
    redis.call('ZADD', set('queued'), seq, ARGV[i])
  end
end
return new
""",
    "lease": """
local owner, count, now, deadline, max_tries = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], tonumber(ARGV[5])
for _, key in ipairs(redis.call('ZRANGEBYSCORE', set('leased'), '-inf', now)) do
  give_up(key, 'the lease of ' .. get(key, 'owner') .. ' expired', max_tries)
end
local grants = {}
if count < 1 then return grants end
for _, key in ipairs(redis.call('ZRANGE', set('queued'), 0, count - 1)) do
  grants[#grants + 1] = {key, get(key, 'task'), tonumber(get(key, 'tries'))}
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
for _, key in ipairs(redis.call('ZRANGE', set('leased'), 0, -1)) do
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
if not get(key, 'state') then return refuse(key) end
if holds(owner, key) and get(key, 'tries') == tries then give_up(key, reason, max_tries) end
return get(key, 'state')
""",
    "commit": """
for i = 1, #ARGV, 2 do
  if not get(ARGV[i], 'state') then return refuse(ARGV[i]) end
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
  local state, seq, ref = unpack(redis.call('HMGET', sample(key), 'state', 'seq', 'ref'))
  if state ~= 'committed' and state ~= 'delivered' then return refuse(key) end
  refs[i], scored[2 * i - 1], scored[2 * i] = ref, seq, key
end
move_all(ARGV, 'committed', 'delivered', scored)
return refs
""",
    "trained": """
local now, keys, scored = ARGV[1], {}, {}
for i = 2, #ARGV do
  local key, state, step = ARGV[i], unpack(redis.call('HMGET', sample(ARGV[i]), 'state', 'step'))
  if state ~= 'delivered' and (state ~= 'trained' or step ~= now) then return refuse(key) end
  keys[i - 1], scored[2 * i - 3], scored[2 * i - 2] = key, now, key
end
move_all(keys, 'delivered', 'trained', scored, 'step', now)
return 0
""",
    "durable": """
local keys = redis.call('ZRANGEBYSCORE', set('trained'), '-inf', ARGV[1])
for _, key in ipairs(keys) do move(key, 'durable', get(key, 'step')) end
return keys
""",
    "rewind": """
local keys = redis.call('ZRANGE', set('delivered'), 0, -1)
for _, state in ipairs({'trained', 'durable'}) do
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', set(state), '(' .. ARGV[1], '+inf')) do keys[#keys + 1] = key end
end
for _, key in ipairs(keys) do move(key, 'committed') end
return keys
""",
    "requeue": """
for _, key in ipairs(ARGV) do
  local state = get(key, 'state')
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
  local state = get(key, 'state')
  if state then
    redis.call('ZREM', set(state), key)
    redis.call('DEL', sample(key))
  end
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
  for _, key in ipairs(redis.call('ZRANGE', set(state), 0, -1)) do
    local seq, ref, tries, reason = unpack(redis.call('HMGET', sample(key), 'seq', 'ref', 'tries', 'reason'))
    local deadline = state == 'leased' and redis.call('ZSCORE', set(state), key) or '0'
    found[#found + 1] = {tonumber(seq), key, state, ref, tonumber(tries), reason, deadline}
  end
end
return found
""",
    "counts": """
local counts = {}
for i, state in ipairs(ARGV) do counts[i] = redis.call('ZCARD', set(state)) end
return counts
""",
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
        self, url: str, *, namespace: str = "specforge", username: str | None = None, password: str | None = None,
        ca_file: str | None = None, cert_file: str | None = None, key_file: str | None = None, timeout: float = 60.0,
    ) -> None:  # fmt: skip
        try:
            import redis
            from redis.backoff import ExponentialBackoff, NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise UserError(
                "metadata in Redis needs its package: python -m pip install 'specforge[redis]'"
            ) from error
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
                url, decode_responses=True, socket_timeout=timeout, socket_connect_timeout=timeout,
                **{name: value for name, value in options.items() if value is not None},
            )  # fmt: skip
            self._client.set_retry(Retry(NoBackoff(), 0))  # a wrong address is said at once
            self._client.ping()
        except (redis.exceptions.RedisError, ValueError, OSError) as error:
            raise UserError(f"metadata in Redis at {self._where}: {error}") from error
        # A server that is started again in the middle of a run is waited for. What it did before it died is done
        # twice then, which every script bears.
        waits = ExponentialBackoff(cap=1.0, base=0.01)
        self._client.set_retry(Retry(waits, _RETRIES, (redis.exceptions.ConnectionError,)))
        self.namespace = "{" + namespace + "}"  # braces keep a cluster's keys on one node
        self._scripts = {name: self._client.register_script(_LUA + body) for name, body in _SCRIPTS.items()}

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
        return iter([
            Entry(key, state, ref, tries, reason, float(deadline))
            for _, key, state, ref, tries, reason, deadline in rows
        ])  # fmt: skip

    def counts(self) -> dict[str, int]:
        """See :class:`MetadataStore`."""
        return dict(zip(STATES, self._run("counts", "counted", *STATES), strict=True))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _run(self, script: str, action: str, *arguments: Any) -> Any:
        try:
            return self._scripts[script](keys=[self.namespace], args=arguments)
        except self._errors.ResponseError as error:
            kind, _, rest = str(error).partition(" ")
            if kind in ("MISCONF", "OOM", "READONLY"):  # its disk or its memory is full, say
                raise unusable(f"in Redis at {self._where}", error) from error
            if kind != "STATE":
                raise
            state, _, key = rest.partition(" ")
            raise StateError(json.loads(key), "" if state == "?" else state, action) from error
        except (self._errors.ConnectionError, self._errors.TimeoutError) as error:
            raise unusable(f"in Redis at {self._where}", error) from error
