"""The queue of flagged inputs: durable, bounded, shared by servers, reviewers and the retrainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.engine import Connection

from guard.errors import ConfigError, QueueKeyError
from guard.relabel import chain, claiming, reading, statements, sweeping
from guard.relabel.blinding import blinded
from guard.relabel.call_thread import CallThread
from guard.relabel.chain import Audit
from guard.relabel.claiming import Claiming
from guard.relabel.database import Database
from guard.relabel.deciding import Deciding
from guard.relabel.encryption import KEY_VARIABLE, Cipher
from guard.relabel.enqueueing import Admission, hidden_among_flagged
from guard.relabel.gold import Eyes, disguised, insert_gold, note_learned
from guard.relabel.items import (
    Answer,
    Counts,
    Decision,
    Enqueued,
    FlaggedInput,
    GoldResult,
    Group,
    QueueItem,
    Settled,
    State,
    Swept,
)
from guard.relabel.migrating import migrate
from guard.relabel.rows import Codec
from guard.relabel.settings import QueueSettings, QueueWaits
from guard.relabel.statements import Order
from guard.types import Float32Array, IntArray

#: Groups that are set per transaction, so that nobody waits long.
_AT_ONCE = 200
#: Answers that are looked at by one statement; SQLite bounds how many numbers one may name.
_ANSWERS_AT_ONCE = 5000


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Queue:
    """Flagged inputs on their way to a reviewer and back. Safe to use from several threads and processes.

    Every method raises `QueueUnavailable` if the database is locked, full or gone; the same queue works again as soon
    as the database does.
    """

    def __init__(
        self, database: Database, waits: QueueWaits, cipher: Cipher | None, clock: Callable[[], datetime]
    ) -> None:
        self.database = database
        self.waits = waits
        self.clock = clock
        self._codec = Codec(cipher)
        self._admission = Admission()
        self._call_thread = CallThread()
        self._random = random.SystemRandom()

    @classmethod
    def open(
        cls,
        url: str,
        settings: QueueSettings | None = None,
        *,
        waits: QueueWaits | None = None,
        clock: Callable[[], datetime] = _utc_now,
    ) -> Queue:
        """Open a queue, and build or migrate its tables.

        Parameters
        ----------
        url : str
            `sqlite:///path` or `postgresql://user@host/name`.
        settings : QueueSettings, optional
            Those that are not as usual are set, for every process; all others stay as they are.
        waits : QueueWaits, optional
            How long this process waits; default is what the environment says.
        clock : callable
            -> the time now, aware UTC; for tests.

        Raises
        ------
        ConfigError
            If the URL is of another kind, or its driver is not installed.
        QueueError
            If a newer version of this package wrote the tables.
        QueueKeyError
            If the queue is encrypted with another key than `GUARD_QUEUE_KEY`, or that variable holds no key.
        QueueUnavailable
            If the database cannot be reached or written.
        """
        waits = waits or QueueWaits.from_environment()
        cipher = Cipher.from_environment()
        database = Database(url, waits.wait_s)
        try:
            migrate(database)
            _check_key(database, cipher)
            queue = cls(database, waits, cipher, clock)
            if settings is not None:
                queue.change_settings(**settings.unusual)
        except BaseException:
            database.close()
            raise
        return queue

    def close(self) -> None:
        """Close all connections."""
        self._call_thread.close()
        self.database.close()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def settings(self) -> QueueSettings:
        """The settings of the queue as they are now; another process may change them.

        Raises
        ------
        ConfigError
            If what the database holds are none.
        """
        with self.database.reading() as connection:
            return reading.read_settings(connection)

    def change_settings(self, **changes: float | None) -> QueueSettings:
        """Change settings of the queue for every process, from its next step on; return all of them.

        Parameters
        ----------
        **changes
            Fields of `QueueSettings`; those that are None stay as they are.

        Raises
        ------
        ConfigError
            If there is no such setting, or a value breaks its rule.
        """
        with self.database.writing(durable=True) as connection:
            connection.execute(statements.LEDGER)  # of two changes at once, the second sees the first
            try:
                settings = reading.read_settings(connection)
            except ConfigError:  # whatever was written there by hand
                settings = QueueSettings()
            settings = settings.changed(**changes)
            connection.execute(statements.CHANGE_SETTINGS, {"changed": settings.to_json()})
        return settings

    # --- the server ---

    def enqueue(self, inputs: Sequence[FlaggedInput]) -> Enqueued:
        """Store flagged inputs in one transaction; when there is no room, a fair sample of each group stays.

        Returns
        -------
        enqueued : Enqueued
            A number per input, None where it was dropped. Drops are counted durably, per group.

        Raises
        ------
        BodyTooLarge
            If a body is larger than `max_body_bytes`; nothing is stored then.
        QueueUnavailable
            If the queue cannot be written within `enqueue_timeout_s`.
        """
        batch = [self._codec.encode(flagged, self._random.random()) for flagged in inputs]
        body_sizes = [len(flagged.body) for flagged in inputs]
        timeout_s = self.waits.enqueue_timeout_s

        def store(wait_s: float) -> Enqueued:
            with self.database.writing(wait_s=wait_s) as connection:
                return self._admission.admit(connection, batch, body_sizes)

        if self.database.is_sqlite:
            return store(timeout_s)
        # A server that is alive says that it is locked before the caller gives up on it.
        return self._call_thread.run(lambda: store(0.8 * timeout_s), timeout_s)

    def note_traffic(self, model: str, bundle_digest: str, requests: Mapping[tuple[datetime, str], int]) -> None:
        """Add to the counts of what was judged: hour, by its begin, and stratum -> requests."""
        rows = [
            {"model": model, "bundle_digest": bundle_digest, "hour": hour, "stratum": stratum, "requests": count}
            for (hour, stratum), count in sorted(requests.items())
        ]
        if rows:
            with self.database.writing(wait_s=self.waits.wait_s) as connection:
                connection.execute(statements.count_traffic(connection.dialect.name), rows)

    def has_audits(self) -> bool:
        """Return whether audits are drawn, or ever were: then nobody sees what would tell them from flagged items."""
        with self.database.reading() as connection:
            return bool(connection.execute(statements.HAS_AUDITS).scalar_one())

    # --- reviewers ---

    def claim(
        self, reviewer: str, n: int = 1, *, order: Order = "suspicion", group: int | None = None
    ) -> list[QueueItem]:
        """Give the reviewer up to `n` pending items for `lease_s` seconds; what the reviewer skipped comes last.

        Parameters
        ----------
        reviewer : str
        n : int
        order : {"suspicion", "age", "group"}
            Lowest p-value first, oldest first, or newest group first and ungrouped items last.
        group : int, optional
            Only items of this group.

        Raises
        ------
        TooManyHeld
            If the reviewer holds `max_held` items already; where fewer are left of it than `n`, so many are given.
        """
        with self.database.writing(passing=True) as connection:
            ids = self._claiming(connection, reviewer).claim(n, order=order, group=group)
        return self._read(ids)

    def claim_items(self, reviewer: str, ids: Sequence[int]) -> list[QueueItem]:
        """Give the reviewer those of the named items that are pending, or already this reviewer's, up to `max_held`."""
        with self.database.writing(passing=True) as connection:
            claimed = self._claiming(connection, reviewer).claim_items(ids)
        return self._read(claimed)

    def held_by(self, reviewer: str) -> list[int]:
        """Return the numbers of the items that a reviewer holds, what ends first at first."""
        with self.database.reading() as connection:
            return claiming.held_by(connection, reviewer, self.clock())

    def renew(self, reviewer: str, ids: Sequence[int]) -> list[int]:
        """Start the leases of these items anew; return those that were still the reviewer's."""
        with self.database.writing(passing=True) as connection:
            until = self.clock() + timedelta(seconds=reading.read_settings(connection).lease_s)
            return claiming.renew(connection, reviewer, ids, self.clock(), until)

    def release(self, reviewer: str, ids: Sequence[int]) -> list[int]:
        """Make these items pending again; return those that were still the reviewer's."""
        with self.database.writing(passing=True) as connection:
            return claiming.release(connection, reviewer, ids, self.clock())

    def skip(self, reviewer: str, item_id: int) -> None:
        """Make an item pending again, and the last one that this reviewer sees."""
        with self.database.writing(passing=True) as connection:
            claiming.skip(connection, reviewer, item_id, self.clock())

    def decide(
        self, reviewer: str, item_id: int, *, is_poisoned: bool, true_label: int | None, note: str = ""
    ) -> Decision:
        """Answer one claimed item; when this returns, the answer is flushed to disk. See `decide_many`."""
        answer = Answer(item_id=item_id, is_poisoned=is_poisoned, true_label=true_label, note=note)
        return self.decide_many(reviewer, [answer])[0]

    def decide_many(self, reviewer: str, answers: Sequence[Answer], *, also_free: bool = False) -> list[Decision]:
        """Answer claimed items, all or none.

        Parameters
        ----------
        reviewer : str
        answers : sequence of Answer
        also_free : bool
            True: items that nobody holds are answered, too, as if claimed just now.

        Raises
        ------
        LeaseExpired
            If an item is not, or no longer, claimed by this reviewer.
        AlreadyDecided
            If an item was answered already.
        ItemGone
            If there is no such item, or its images were removed.
        UnknownLabel
            If a true label is none of the model's classes.
        """
        with self.database.writing(durable=True) as connection:
            deciding = self._deciding(connection, reviewer, also_free=also_free)
            return [
                decision
                for start in range(0, len(answers), _ANSWERS_AT_ONCE)
                for decision in deciding.answer(answers[start : start + _ANSWERS_AT_ONCE])
            ]

    def supersede(
        self, reviewer: str, decision_id: int, *, is_poisoned: bool, true_label: int | None, note: str = ""
    ) -> Decision:
        """Put another answer in the place of one that stands, one's own or another's; the old row stays.

        An item that was trained with is to be trained with again.

        Raises
        ------
        AlreadyDecided
            If the decision was superseded or withdrawn.
        ItemGone, UnknownLabel
            As `decide_many`.
        QueueError
            If there is no such decision.
        """
        with self.database.writing(durable=True) as connection:
            deciding = self._deciding(connection, reviewer)
            return deciding.supersede(decision_id, is_poisoned, true_label, note)

    def withdraw(self, reviewer: str, decision_id: int) -> None:
        """Take back one's own answer: the row stays, and the item is this reviewer's again.

        Raises
        ------
        AlreadyDecided
            If the decision was superseded or withdrawn.
        ItemGone
            If the item's images were removed.
        QueueError
            If there is no such decision, or it is another reviewer's.
        """
        with self.database.writing(durable=True) as connection:
            self._deciding(connection, reviewer).withdraw(decision_id)

    # --- housekeeping ---

    def sweep(self, now: datetime | None = None) -> Swept:
        """Return ended leases, and remove images older than `retention_days`; run it every few seconds.

        Answered items that no bundle has learned from are kept, however old.
        """
        return sweeping.sweep(self.database, self.settings, now or self.clock())

    def verify_decisions(self) -> Audit:
        """Check the chain of decisions from its first row; reads all of them."""
        with self.database.reading() as connection:
            return chain.audit(connection)

    # --- reading ---

    def get(self, item_id: int) -> QueueItem:
        """Return one item.

        Raises
        ------
        ItemGone
            If there is no such item, or its images were removed.
        """
        with self.database.reading() as connection:
            return reading.read_item(connection, self._codec, item_id)

    def items(
        self, *, state: State | None = None, model: str | None = None, limit: int = 100, after_id: int = 0
    ) -> list[QueueItem]:
        """Return up to `limit` items that still have their images, by number, above `after_id`."""
        with self.database.reading() as connection:
            ids = reading.list_items(connection, state=state, model=model, limit=limit, after_id=after_id)
            return reading.read_items(connection, self._codec, ids)

    def decisions(self, *, after_id: int = 0, reviewer: str | None = None, limit: int = 1000) -> list[Decision]:
        """Return up to `limit` answers, by number, above `after_id`; also superseded and withdrawn ones."""
        with self.database.reading() as connection:
            return reading.list_decisions(connection, after_id=after_id, reviewer=reviewer, limit=limit)

    def counts(self, *, seen_by: str | None = None) -> Counts:
        """Count items, drops and decisions; for a reviewer with gold items, each in the state that this one sees."""
        with self.database.reading() as connection:
            counts = reading.read_counts(connection)
            return counts if seen_by is None else self._eyes(connection, seen_by).count(counts)

    # --- what one reviewer sees ---

    def blind(self, items: Sequence[QueueItem]) -> list[QueueItem]:
        """Return items as people may see them: without what would tell an audit, once this queue has an audit sample.

        Asked after the items were read, so that none of them can be the first audit.
        """
        return [blinded(item) for item in items] if self.has_audits() else list(items)

    def see(self, reviewer: str, item: QueueItem) -> QueueItem:
        """Return an item as a reviewer may see it: without the answers of others, a gold item like any other."""
        with self.database.reading() as connection:
            return self._eyes(connection, reviewer).see([item])[0]

    def has_answered(self, reviewer: str, item_id: int) -> bool:
        """Return whether a reviewer ever answered an item, even if the answer does not stand any more."""
        with self.database.reading() as connection:
            return self._eyes(connection, reviewer).has_answered(item_id)

    # --- retraining ---

    def settled(self, model: str) -> list[Settled]:
        """Return the numbers of all items of a model whose answer counts; gold items are left out."""
        with self.database.reading() as connection:
            return reading.list_settled(connection, model)

    def count_settled(self, model: str, *, since: datetime | None = None, seen_by: str | None = None) -> int:
        """Count the items of a model whose answer counts, or those of them whose answer came after a time.

        For a reviewer with gold items that this one sees as answered.
        """
        values: dict[str, Any] = {"model": model} | ({} if since is None else {"since": since})
        statement = statements.COUNT_SETTLED if since is None else statements.COUNT_SETTLED_SINCE
        with self.database.reading() as connection:
            settled = int(connection.execute(statement, values).scalar_one())
            return settled if seen_by is None else settled + self._eyes(connection, seen_by).count_settled(model, since)

    def count_standing(self, reviewer: str, *, after_id: int = 0) -> int:
        """Count the answers of a reviewer, with a number above one, that were neither withdrawn nor replaced."""
        with self.database.reading() as connection:
            values = {"reviewer": reviewer, "after_id": after_id}
            return int(connection.execute(statements.COUNT_STANDING, values).scalar_one())

    def count_pending(self, model: str, *, after_id: int = 0) -> int:
        """Count the pending flagged items of a model with a number above one; audits are left out."""
        with self.database.reading() as connection:
            values = {"model": model, "after_id": after_id}
            return int(connection.execute(statements.COUNT_PENDING_AFTER, values).scalar_one())

    def newest_pending(self, model: str) -> int:
        """Return the highest number of a pending item of a model, 0 if there is none."""
        with self.database.reading() as connection:
            return int(connection.execute(statements.NEWEST_PENDING, {"model": model}).scalar_one())

    def portions(self, ids: Sequence[int], *, size: int = _AT_ONCE) -> Iterator[list[QueueItem]]:
        """Yield the named items in parts, without the bodies of their requests; those without images are left out."""
        for start in range(0, len(ids), size):
            with self.database.reading() as connection:
                part = reading.read_items(connection, self._codec, ids[start : start + size], with_bodies=False)
            yield part

    def mark_trained(
        self, ids: Sequence[int], bundle_digest: str, *, decision_ids: Sequence[int] | None = None
    ) -> None:
        """Note that a bundle learned from these decided items.

        Parameters
        ----------
        ids : sequence of int
        bundle_digest : str
        decision_ids : sequence of int, optional
            The answers that it learned, one per item; an item whose answer was changed meanwhile stays untrained.
        """
        named = [{"item_id": item_id, "digest": bundle_digest} for item_id in ids]
        statement = statements.MARK_TRAINED
        if decision_ids is not None:
            statement = statements.MARK_TRAINED_IF_UNCHANGED
            named = [
                values | {"expected_decision_id": decision_id}
                for values, decision_id in zip(named, decision_ids, strict=True)
            ]
        if named:
            with self.database.writing(durable=True) as connection:
                connection.execute(statement, named)
                for start in range(0, len(ids), _ANSWERS_AT_ONCE):
                    note_learned(connection, ids[start : start + _ANSWERS_AT_ONCE])

    # --- groups ---

    def set_groups(self, groups: Mapping[int, int]) -> None:
        """Put items into groups: item number -> group number, above 0; 0 or less takes an item out of its group."""
        pairs = [{"item_id": item_id, "group": max(0, group)} for item_id, group in sorted(groups.items())]
        for start in range(0, len(pairs), _AT_ONCE):
            with self.database.writing(passing=True) as connection:
                connection.execute(statements.SET_GROUP, pairs[start : start + _AT_ONCE])

    def groups(self, *, seen_by: str | None = None) -> list[Group]:
        """Return all groups, those with most pending items first; for a reviewer with what is open for that one."""
        with self.database.reading() as connection:
            return reading.read_groups(connection, seen_by)

    def pending_rows(self, model: str, limit: int) -> tuple[IntArray, IntArray, IntArray, Float32Array]:
        """Return numbers, suspect labels, groups (0 = none), all (n,), and features (n, d).

        Of up to `limit` pending items of a model, newest first.
        """
        with self.database.reading() as connection:
            return reading.read_pending_features(connection, self._codec, model, limit)

    # --- gold items ---

    def add_gold(
        self, item: FlaggedInput, is_poisoned: bool, true_label: int | None, *, copy_of: int | None = None
    ) -> int:
        """Add an item whose answer is known, as if it came just now. Every reviewer gets it once, among others.

        It is never decided or trained with, and never gives way; after `retention_days` it goes like any other.

        Parameters
        ----------
        item : FlaggedInput
        is_poisoned : bool
        true_label : int or None
        copy_of : int, optional
            The answered item that it is a copy of: who answered that one is not asked.
        """
        with self.database.writing(durable=True) as connection:
            disguise = disguised(connection, item, self.clock())
            (rows,) = hidden_among_flagged(connection, [self._codec.encode(disguise, statements.GOLD_TICKET)])
            return insert_gold(connection, rows, is_poisoned, true_label, copy_of)

    def gold_results(self, reviewer: str) -> GoldResult:
        """Return how a reviewer answered gold items."""
        with self.database.reading() as connection:
            return reading.read_gold_results(connection, reviewer)

    def _eyes(self, connection: Connection, reviewer: str) -> Eyes:
        return Eyes(connection, reviewer, reading.read_settings(connection).quorum)

    def _claiming(self, connection: Connection, reviewer: str) -> Claiming:
        return Claiming(connection, reviewer, reading.read_settings(connection), self.clock())

    def _deciding(self, connection: Connection, reviewer: str, *, also_free: bool = False) -> Deciding:
        return Deciding(connection, reviewer, reading.read_settings(connection), self.clock(), also_free=also_free)

    def _read(self, ids: Sequence[int]) -> list[QueueItem]:
        if not ids:
            return []
        with self.database.reading() as connection:
            return reading.read_items(connection, self._codec, ids)


def _check_key(database: Database, cipher: Cipher | None) -> None:
    with database.reading() as connection:
        check = connection.execute(statements.KEY_CHECK).scalar()
    if cipher is None:
        if check is not None:
            raise QueueKeyError(f"the queue is encrypted. Set {KEY_VARIABLE} to the key that it was written with.")
        return
    if check is not None:
        cipher.verify_check(bytes(check))
    with database.writing(durable=True) as connection:  # with the first key: it may be newer than the one before
        connection.execute(statements.SET_KEY_CHECK, {"new_check": cipher.make_check()})
