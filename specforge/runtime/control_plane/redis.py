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
from specforge.packages import install_hint
from specforge.runtime.control_plane.metadata import BOUNDED, STATES, Conflict, Move, Row, State, Text, unusable

logger = logging.getLogger(__name__)

# A script returns the JSON of the result of `run` and of the stray keys that it found, followed by the requested texts:
# redis-py reads one string much faster than nested lists. Lua encodes an empty list as {}.
_LUA = """
local space, strays, reply = KEYS[1], {}, {''}
local prefix = space .. ':sample:'
local known, ranks = {STATES}, {RANKS}
local SEQ, KEY, STATE, TRIES = 1, 2, 3, 6  -- in a row
local call, pcall, find = redis.call, redis.pcall, string.find
local function hash(key) return prefix .. key end
local function set(state) return space .. ':' .. state end
local function whole(text) return text and #text < 16 and find(text, '^%-?%d+$') and text end
local function read(key, text)  -- a row and its text; false if there is none, or a damaged one
  local found = pcall('HMGET', hash(key), 'seq', 'state', 'owner', 'tries', 'step', 'reason', text)
  local seq, state, owner, tries, step, reason, long = unpack(found)
  if not (known[state] and whole(seq) and whole(tries)) then return false, '' end
  local deadline = ranks[state] == 'deadline' and call('ZSCORE', set(state), key) or '0'
  return {seq, key, state, owner or '', deadline, tries, whole(step) or '0', reason or ''}, long or ''
end
local function repair(key, row)  -- a damaged row is deleted, a missing member of a set is added
  if not row then
    for state in pairs(known) do call('ZREM', set(state), key) end
    if call('DEL', hash(key)) == 1 then strays[#strays + 1] = key end
  elseif not call('ZSCORE', set(row[STATE]), key) then
    call('ZADD', set(row[STATE]), ranks[row[STATE]] == 'deadline' and 0 or row[SEQ], key)
  end
end
local function list(found, state, low, high, limit, text)  -- append the rows of a state, and their texts to the reply
  local before, clean = #found
  repeat  -- until there are no stray keys among the first
    local n = before
    clean = true
    for _, key in ipairs(call('ZRANGEBYSCORE', set(state), low, high, 'LIMIT', 0, limit)) do
      local row, long = read(key, text)
      if row and row[STATE] == state then
        n = n + 1
        found[n] = row
        if text ~= '' then reply[n + 1] = long end
      else
        clean = call('ZREM', set(state), key) == 0 and clean
        strays[#strays + 1] = key
      end
    end
  until clean or limit == '-1'
end
local function batched(command, lists)  -- Lua passes a call some thousands of arguments at most
  for state, words in pairs(lists) do
    for i = 1, #words, 1000 do call(command, set(state), unpack(words, i, math.min(i + 999, #words))) end
  end
end
local function run()
"""
_LUA = _LUA.replace("STATES", ", ".join(f"{state} = true" for state in State))
_LUA = _LUA.replace("RANKS", ", ".join(f"{state} = '{column}'" for state, column in BOUNDED.items()))
_END = """
end
reply[1] = cjson.encode({run(), strays})
return reply
"""
_SCRIPTS = {
    "add": """
local new, state = {}, ARGV[1]
for i = 2, #ARGV, 2 do
  local key, task = ARGV[i], ARGV[i + 1]
  new[i / 2] = not read(key, '')
  if new[i / 2] then
    local seq = call('INCR', space .. ':seq')  -- the first write, which fails if the memory is full
    if call('EXISTS', hash(key)) == 1 then repair(key, false) end
    call('HSET', hash(key), 'task', task, 'state', state, 'seq', seq, 'tries', 0, 'ref', '', 'reason', '')
    call('ZADD', set(state), ranks[state] and 0 or seq, key)
  end
end
return new
""",
    "get": """
local rows = {}
for i, key in ipairs(cjson.decode(ARGV[1])) do
  local row, long = read(key, ARGV[2])
  rows[i] = row
  if ARGV[2] ~= '' then reply[i + 1] = long end
end
return rows
""",
    "find": """
local found, text, after, upto, limit = {}, ARGV[2], ARGV[3], ARGV[4], ARGV[5]
for _, state in ipairs(cjson.decode(ARGV[1])) do
  list(found, state, ranks[state] and after or '-inf', ranks[state] and upto or '+inf', limit, text)
end
return found
""",
    "lease": """
local found, owner, deadline, limit, leavers, joiners = {}, ARGV[1], ARGV[2], ARGV[3], {}, {}
list(found, 'queued', '-inf', '+inf', limit, 'task')
for i, row in ipairs(found) do
  local key = row[KEY]
  call('HSET', hash(key), 'state', 'leased', 'owner', owner, 'tries', row[TRIES] + 1)
  leavers[i], joiners[2 * i - 1], joiners[2 * i] = key, deadline, key
end
batched('ZREM', {queued = leavers})
batched('ZADD', {leased = joiners})
return found
""",
    "move": """
local moves, text, others, found, refs = cjson.decode(ARGV[1]), ARGV[2], ARGV[3] ~= '', {}, 3
local moved_text = others and '' or text
local function conflict()
  local rows = {}
  for _, move in ipairs(moves) do
    for _, key in ipairs(move[1]) do
      local i = #rows + 1
      local row, long = read(key, text)
      rows[i] = row
      if text ~= '' then reply[i + 1] = long end
      repair(key, row)
    end
  end
  return rows
end
for _, move in ipairs(moves) do
  local keys, states, _, _, expected = unpack(move)
  local allowed, owner, tries, deadline = {}, expected.owner, expected.tries, expected.deadline
  for state in string.gmatch(states, '%a+') do allowed[state] = true end
  for _, key in ipairs(keys) do
    local name = hash(key)
    local row = pcall('HMGET', name, 'state', 'seq', 'tries', moved_text)
    if not (allowed[row[1]] and whole(row[2]) and whole(row[3]))
      or (owner and owner ~= (call('HGET', name, 'owner') or ''))
      or (tries and tries ~= tonumber(row[3]))
      or (deadline and deadline ~= tonumber(call('ZSCORE', set(row[1]), key) or 0))
    then return conflict() end
    row[5], found[#found + 1] = name, row
  end
end
local removed, added, n = {}, {}, 0
for _, move in ipairs(moves) do
  local keys, _, to, changes, _, has_refs = unpack(move)
  local score, words, list = changes[ranks[to]], {'state', to}, added[to] or {}
  added[to], changes.deadline = list, nil
  for name, value in pairs(changes) do
    words[#words + 1] = name
    words[#words + 1] = value
  end
  if has_refs then words[#words + 1] = 'ref' end
  local last = #words + 1
  for _, key in ipairs(keys) do
    n = n + 1
    local from, seq, _, long, name = unpack(found[n], 1, 5)
    list[#list + 1] = score or ranks[to] and (call('ZSCORE', set(from), key) or 0) or seq
    list[#list + 1] = key
    if from ~= to then
      local leavers = removed[from] or {}
      removed[from], leavers[#leavers + 1] = leavers, key
    end
    if has_refs then
      refs = refs + 1
      words[last] = ARGV[refs]
    end
    call('HSET', name, unpack(words))
    if moved_text ~= '' then reply[n + 1] = long or '' end
  end
end
batched('ZREM', removed)
batched('ZADD', added)
for i, key in ipairs(others and cjson.decode(ARGV[3]) or {}) do
  local long = pcall('HGET', hash(key), text)
  reply[i + 1] = type(long) == 'string' and long or ''
end
return true
""",
    "remove": """
for _, key in ipairs(cjson.decode(ARGV[1])) do
  local row = read(key, '')
  if row then call('ZREM', set(row[STATE]), key) end
  call('DEL', hash(key))
end
return true
""",
    "counts": """
local counts = {}
for i, state in ipairs(ARGV) do counts[i] = call('ZCARD', set(state)) end
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
_STATES = {str(state): state for state in State}
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
            raise UserError(f"metadata in Redis needs the package redis: {install_hint('redis')}") from error
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
        new, _ = self._run("add", state, *(word for item in items for word in item))
        return list(new)

    def get(self, keys: Sequence[str], text: Text = "") -> list[Row | None]:
        """See :class:`MetadataStore`."""
        return _rows(*self._run("get", _json(keys), text))

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
        rows, texts = self._run("find", _json(list(states)), text, *bounds, -1 if limit is None else limit)
        order = sorted(range(len(rows)), key=lambda i: int(rows[i][0]))  # the order of insertion
        found = _rows(rows, texts)
        return [row for i in order if (row := found[i]) is not None]

    def lease(self, owner: str, deadline: float, limit: int) -> list[Row]:
        """See :class:`MetadataStore`."""
        return [row for row in _rows(*self._run("lease", owner, repr(deadline), limit)) if row is not None]

    def move(self, moves: Sequence[Move], text: Text = "", texts_of: Sequence[str] | None = None) -> dict[str, str]:
        """See :class:`MetadataStore`."""
        keys = [key for move in moves for key in move.keys]
        if not keys:
            return {}
        words = [
            (keys, " ".join(states), to, {name: str(value) for name, value in changes.items()}, expected, bool(refs))
            for keys, states, to, changes, expected, refs in moves
        ]
        refs = (move.refs[key] for move in moves if move.refs for key in move.keys)
        others = "" if texts_of is None else _json(texts_of)
        found, texts = self._run("move", _json(words), text, others, *refs)
        if found is True:
            return dict(zip(keys if texts_of is None else texts_of, texts, strict=True)) if text else {}
        raise Conflict(dict(zip(keys, _rows(found, texts), strict=True)))

    def remove(self, keys: Sequence[str]) -> None:
        """See :class:`MetadataStore`."""
        self._run("remove", _json(keys))

    def counts(self) -> dict[str, int]:
        """See :class:`MetadataStore`."""
        counts, _ = self._run("counts", *STATES)
        return dict(zip(STATES, counts, strict=True))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _run(self, script: str, *arguments: Any) -> tuple[Any, list[str]]:
        """The result of a script, and the texts that were requested."""
        try:
            reply, *texts = self._scripts[script](keys=[self.namespace], args=arguments)
            result, strays = json.loads(reply)
        except (self._errors.RedisError, ValueError, OSError) as error:
            raise unusable(f"in Redis at {self._where}", _meaning(error)) from error
        if strays:
            logger.warning(
                "metadata in Redis at %s: left out %d keys that are not in the state they were listed in: %s",
                self._where,
                len(strays),
                ", ".join(map(repr, strays[:3])),
            )
        return result, texts


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # Lua rejects escaped lone surrogates


def _rows(found: Sequence[Any], texts: Sequence[str]) -> list[Row | None]:
    rows: list[Row | None] = []
    for values, text in zip(found, texts or [""] * len(found), strict=True):
        if values:
            _, key, state, owner, deadline, tries, step, reason = values
            rows.append(Row(key, _STATES[state], owner, float(deadline), int(tries), int(step), reason, text))
        else:
            rows.append(None)
    return rows


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
