"""A metadata store in Redis: for several hosts. Each method is one Lua script, which Redis runs atomically.

A row is a hash; each state is a sorted set of keys. The score is the order of insertion, the deadline of a lease, or
the step that trained the sample. The hash decides: keys in a set whose hash is missing or in another state are removed
from the set and named in a warning.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from specforge.errors import UserError
from specforge.files import first_line
from specforge.runtime.control_plane.metadata import STATES, Conflict, Move, Row, State, Text, unusable

logger = logging.getLogger(__name__)

# Arguments and results are JSON, which redis-py passes on much faster than lists. Results of `run` are returned with
# the stray keys that were found on the way. Lua encodes empty lists as {}.
_LUA = """
local space, strays = KEYS[1], {}
local known = {STATES}
local ranks = {leased = 'deadline', claimed = 'deadline', trained = 'step', durable = 'step'}
local function hash(key) return space .. ':sample:' .. key end
local function set(state) return space .. ':' .. state end
local function whole(text)
  local number = text and string.match(text, '^%-?%d+$') and tonumber(text)
  return number and math.abs(number) < 2^53 and number
end
local SEQ, KEY, STATE, OWNER, DEADLINE, TRIES, STEP = 1, 2, 3, 4, 5, 6, 7
local function read(key, text)  -- false if there is no row, or a damaged one
  local found = redis.pcall('HMGET', hash(key), 'seq', 'state', 'owner', 'tries', 'step', 'reason', text)
  if found.err then return false end
  local seq, state, owner, tries, step, reason, long = unpack(found)
  seq, tries = whole(seq), whole(tries)
  if not (known[state] and seq and tries) then return false end
  local deadline = ranks[state] == 'deadline' and redis.call('ZSCORE', set(state), key) or '0'
  return {seq, key, state, owner or '', deadline, tries, whole(step) or 0, reason or '', long or ''}
end
local function fits(row, states, expected)
  local found = false
  for _, state in ipairs(states) do found = found or state == row[STATE] end
  return found and (not expected.owner or expected.owner == row[OWNER])
    and (not expected.deadline or expected.deadline == tonumber(row[DEADLINE]))
    and (not expected.tries or expected.tries == row[TRIES]) and (not expected.step or expected.step == row[STEP])
end
local function repair(key, row)  -- a damaged row is deleted, a missing member of a set is added
  if not row then
    for state in pairs(known) do redis.call('ZREM', set(state), key) end
    if redis.call('DEL', hash(key)) == 1 then strays[#strays + 1] = key end
  elseif not redis.call('ZSCORE', set(row[STATE]), key) then
    redis.call('ZADD', set(row[STATE]), ranks[row[STATE]] == 'deadline' and 0 or row[SEQ], key)
  end
end
local function append(groups, name, ...)
  groups[name] = groups[name] or {}
  for _, word in ipairs({...}) do table.insert(groups[name], word) end
end
local function batched(command, groups)  -- Lua passes a call some thousands of arguments at most
  for state, words in pairs(groups) do
    for i = 1, #words, 1000 do redis.call(command, set(state), unpack(words, i, math.min(i + 999, #words))) end
  end
end
local function run()
""".replace("STATES", ", ".join(f"{state} = true" for state in State))
_END = """
end
return cjson.encode({run(), strays})
"""
_SCRIPTS = {
    "add": """
local new, state = {}, ARGV[2]
for i, item in ipairs(cjson.decode(ARGV[1])) do
  local key, task = item[1], item[2]
  new[i] = not read(key, '')
  if new[i] then
    local seq = redis.call('INCR', space .. ':seq')  -- the first write, which fails if the memory is full
    repair(key, false)
    redis.call('HSET', hash(key), 'task', task, 'state', state, 'seq', seq, 'tries', 0, 'ref', '', 'reason', '')
    redis.call('ZADD', set(state), ranks[state] and 0 or seq, key)
  end
end
return new
""",
    "get": """
local rows = {}
for i, key in ipairs(cjson.decode(ARGV[1])) do rows[i] = read(key, ARGV[2]) end
return rows
""",
    "find": """
local found, text, after, upto, limit = {}, ARGV[2], ARGV[3], ARGV[4], ARGV[5]
for _, state in ipairs(cjson.decode(ARGV[1])) do
  local rows, clean
  repeat  -- until there are no stray keys among the first
    rows, clean = {}, true
    for _, key in ipairs(redis.call('ZRANGEBYSCORE', set(state), after, upto, 'LIMIT', 0, limit)) do
      local row = read(key, text)
      if row and row[STATE] == state then rows[#rows + 1] = row
      else
        clean = redis.call('ZREM', set(state), key) == 0 and clean
        strays[#strays + 1] = key
      end
    end
  until clean or limit == '-1'
  for _, row in ipairs(rows) do found[#found + 1] = row end
end
return found
""",
    "move": """
local moves, text = cjson.decode(ARGV[1]), ARGV[2]
local rows, fit = {}, true
for i, move in ipairs(moves) do
  rows[i] = read(move[1], text)
  fit = fit and rows[i] and fits(rows[i], move[2], move[4])
end
if not fit then
  for i, move in ipairs(moves) do repair(move[1], rows[i]) end
  return {false, rows}
end
local removed, added, texts = {}, {}, {}
for i, move in ipairs(moves) do
  local key, changes, row = move[1], move[3], rows[i]
  local state, words = changes.state or row[STATE], {}
  local score = changes[ranks[state]] or (ranks[state] and row[ranks[state] == 'step' and STEP or DEADLINE]) or row[SEQ]
  if state ~= row[STATE] then append(removed, row[STATE], key) end
  append(added, state, score, key)
  changes.deadline = nil  -- it is the score
  for name, value in pairs(changes) do
    words[#words + 1] = name
    words[#words + 1] = value
  end
  if #words > 0 then redis.call('HSET', hash(key), unpack(words)) end
  texts[i] = row[9]
end
batched('ZREM', removed)
batched('ZADD', added)
return {true, texts}
""",
    "remove": """
for _, key in ipairs(cjson.decode(ARGV[1])) do
  local row = read(key, '')
  if row then redis.call('ZREM', set(row[STATE]), key) end
  redis.call('DEL', hash(key))
end
return true
""",
    "counts": """
local counts = {}
for i, state in ipairs(ARGV) do counts[i] = redis.call('ZCARD', set(state)) end
return counts
""",
}
_MEANINGS = {  # of errors that redis-py shortens, or that explain too little
    "OutOfMemoryError": "its memory is full",
    "ReadOnlyError": "it is a read-only replica; give the address of its master",
    "NoPermissionError": "this user lacks a permission that is needed",
    "AuthenticationError": "it requires a password, or a different one",
    "BusyLoadingError": "it is still loading its data",
    "MovedError": "it is a cluster node, and the keys of this run are on another node",
    "AskError": "it is a cluster node, and the keys of this run are being moved to another node",
    "ClusterCrossSlotError": "it is a cluster node that cannot keep the keys of a run together",
    "ClusterDownError": "its cluster is down",
    "MasterDownError": "it is a replica that has lost its master",
}
_RETRIES = 15  # with waits that grow to one second: about ten seconds


class RedisMetadataStore:
    """A :class:`~specforge.runtime.control_plane.metadata.MetadataStore` on a Redis server.

    Args:
        url: ``redis://host:port/0``, or ``rediss://`` for TLS.
        namespace: prefix of every key; runs that share a server need different ones.
        username: user name, for servers with access control lists.
        password: password, if the server requires one.
        ca_file: certificates that sign the server's; the system's by default.
        cert_file: certificate of this client, if the server requires one.
        key_file: key of that certificate.
        timeout: seconds to wait for an answer.

    Raises:
        UserError: the package is missing, or the server does not answer, rejects this client or may delete samples.
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
            raise UserError("metadata in Redis needs its package: python -m pip install 'specforge[redis]'") from error
        tls = {"ssl_ca_certs": ca_file, "ssl_certfile": cert_file, "ssl_keyfile": key_file}
        options: dict[str, Any] = {"username": username, "password": password}
        if url.startswith("rediss://"):
            options |= tls
        elif any(tls.values()):
            raise UserError("metadata in Redis: certificates require TLS; write the address as rediss://")
        self._errors = redis.exceptions
        self._where = url.rpartition("//")[2].rpartition("@")[2]  # without the password that an address may contain
        try:
            self._client = redis.Redis.from_url(
                url,
                decode_responses=True,
                encoding_errors="surrogateescape",
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                **{name: value for name, value in options.items() if value is not None},
            )
            self._client.set_retry(Retry(NoBackoff(), 0))  # a wrong address is reported at once
            self.namespace = "{" + namespace + "}"  # braces keep the keys on one node of a cluster
            self._scripts = {name: self._client.register_script(_LUA + body + _END) for name, body in _SCRIPTS.items()}
            self._scripts["counts"](keys=[self.namespace], args=STATES)
            self._check_eviction()
        except (redis.exceptions.RedisError, ValueError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"metadata in Redis at {self._where}: {_meaning(error)}") from error
        # If the server restarts in the middle of a run, the client waits for it. A script whose answer was lost then
        # runs twice; the second time, its compare-and-set finds the rows changed.
        waits = ExponentialBackoff(cap=1.0, base=0.01)
        self._client.set_retry(Retry(waits, _RETRIES, (redis.exceptions.ConnectionError,)))

    def _check_eviction(self) -> None:
        """Raise UserError for a server that deletes samples when its memory is full."""
        try:
            info = self._client.info("memory")
        except self._errors.ResponseError:  # this user may not ask; deleted samples are noticed later
            return
        policy, limit = str(info.get("maxmemory_policy")), info.get("maxmemory")
        if policy.startswith("allkeys") and limit:
            raise UserError(
                f"metadata in Redis at {self._where}: it deletes keys when its memory of {limit:,} bytes is full "
                f"(maxmemory-policy {policy}); set maxmemory-policy to noeviction"
            )

    def add(self, items: Iterable[tuple[str, str]], state: State = State.QUEUED) -> list[bool]:
        """See :class:`MetadataStore`."""
        return list(self._run("add", _json(list(items)), state))

    def get(self, keys: Sequence[str], text: Text = "") -> list[Row | None]:
        """See :class:`MetadataStore`."""
        return [_row(row) if row else None for row in self._run("get", _json(keys), text)]

    def find(
        self,
        states: Collection[State],
        *,
        after: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        text: Text = "",
    ) -> list[Row]:
        """See :class:`MetadataStore`."""
        bounds = "-inf" if after is None else f"({after!r}", "+inf" if until is None else repr(until)
        rows = self._run("find", _json(list(states)), text, *bounds, -1 if limit is None else limit)
        return [_row(row) for row in sorted(rows)]  # their order of insertion comes first

    def move(self, moves: Sequence[Move], text: Text = "") -> list[str]:
        """See :class:`MetadataStore`."""
        done, found = self._run("move", _json(moves), text)
        if not done:
            raise Conflict([_row(row) if row else None for row in found])
        return list(found)

    def remove(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        self._run("remove", _json(keys))

    def counts(self) -> dict[str, int]:
        """See :class:`MetadataStore`."""
        return dict(zip(STATES, self._run("counts", *STATES), strict=True))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _run(self, script: str, *arguments: Any) -> Any:
        try:
            result, strays = json.loads(self._scripts[script](keys=[self.namespace], args=arguments))
        except (self._errors.RedisError, ValueError, OSError) as error:
            raise unusable(f"in Redis at {self._where}", _meaning(error)) from error
        if strays:
            logger.warning(
                "metadata in Redis at %s: left out %d keys that are not in the state they were listed in: %s",
                self._where,
                len(strays),
                ", ".join(map(repr, strays[:3])),
            )
        return result


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))  # Lua rejects escaped lone surrogates


def _row(values: Sequence[Any]) -> Row:
    _, key, state, owner, deadline, *rest = values
    return Row(key, State(state), owner, float(deadline), *rest)


def _meaning(error: Exception) -> str:
    """The meaning of an error of redis-py, in one line and without the position in a script."""
    text = first_line(error).partition(" script: ")[0].rstrip(".")
    if "WRONGTYPE" in text:
        return "its keys in this namespace are not those of a run; choose another namespace, after #"
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        return f"its address has an unknown option: {unknown.group(1)}"
    kind = "NoPermissionError" if text.startswith("The user executing the script can't") else type(error).__name__
    meaning = _MEANINGS.get(kind)
    return f"{meaning} ({text})" if meaning else text
