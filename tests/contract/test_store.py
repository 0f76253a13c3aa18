"""The store: what is committed stays, what conflicts is dropped whole, what cannot be written is said and not lost."""

import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import mariadb
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, inspect
from sqlalchemy.exc import OperationalError

from nodepool import model as m
from nodepool.clock import SystemClock, VirtualClock
from nodepool.coord.local import LocalReferee, file_lock, server_lock
from nodepool.errors import ConfigError, Conflict, NotFound, OutOfOffice, Refused, StoreUnavailable
from nodepool.store import engine, migrations, open_store
from nodepool.store.engine import each
from nodepool.store.rows import CODECS
from nodepool.store.tables import metadata


@pytest.fixture(scope="session")
def server():
    """A MariaDB for all tests; gives a function that makes an empty database and tells its URL."""
    with mariadb.running() as database:
        yield database


@pytest.fixture(params=["sqlite", "mariadb"])
def url(request, tmp_path):
    """An empty database."""
    return f"sqlite:///{tmp_path}/nodepool.db" if request.param == "sqlite" else request.getfixturevalue("server")()


@pytest.fixture
def store(url):
    store = open_store(url, VirtualClock())
    yield store
    store.close()


@pytest.fixture
def lock(tmp_path):
    """How a daemon locks its database."""

    def of(store):
        return file_lock(tmp_path / "lock") if store.path else server_lock(store.engine)

    return of


on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


def machine(name="r1n1", **more):
    return m.Machine(0, name, "rack1", m.MachineState.ENROLLED, 1, 1, **more)


RECORDS = [
    machine(facts={"fact.cpus": "4", "ünïcode": "✓"}, accepted=True, work=m.Work("step", 1, 2, 3, 4, "w", "e", "c")),
    m.Node(0, "l", "p", "q", 1, "m", "i", "b", "g", m.NodeState.READY, 1, 1, ready_at=2, host_key="ssh-ed25519 AAAA"),
    m.Request(0, "token", (m.Wanted("a", 2), m.Wanted("b")), m.RequestState.PENDING, 1, 1, ssh_keys=("k1", "k2")),
    m.RequestNode(0, 1, 0, "l", 7),
    m.Build("ab" * 16, "i", m.BuildState.READY, 1, 1, files={"raw": "/x"}, size=2**40, seconds=1.5),
    m.Copy(0, "b", "i", "p", "ready", 1, "n", "e"),
    m.Boot(0, 1, "t" * 32, m.BootState.UP, 1, nonce="n" * 32),
    m.Operation(0, 1, "write", m.OperationState.RUNNING, 1, params={"a": "b"}, result={}, done=2**45, by_agent=True),
    m.Owner("planner", 3, "me", 9),
    m.Status("planner", "said", 1, {"x": 1}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was_stored(store, record):
    stored = store.write(lambda tx: tx.add(record))
    changed = store.write(lambda tx: tx.put(replace(stored)))
    found = store.read(lambda tx: tx.get(type(record), stored.id))
    assert found == changed == replace(stored, version=1)


def schema(engine):
    """What the database says of itself: the columns (order aside: later ones are added at the end) and the indexes."""
    found = inspect(engine)
    told = {}
    for table in found.get_table_names():
        for column in found.get_columns(table):
            kind = column["type"].compile(engine.dialect)
            told[table, column["name"]] = kind, column["nullable"], str(column["default"]).strip("'")
        told[table, "key"] = found.get_pk_constraint(table)["constrained_columns"]
        told[table, "indexes"] = sorted((i["column_names"], bool(i["unique"])) for i in found.get_indexes(table))
        told[table, "unique"] = sorted(u["column_names"] for u in found.get_unique_constraints(table))
        told[table, "options"] = found.get_table_options(table)
    return told


@pytest.fixture
def migrated(url, tmp_path, request):
    """Another empty database of the same kind."""
    other = f"sqlite:///{tmp_path}/migrated.db" if url.startswith("sqlite") else request.getfixturevalue("server")()
    engine = create_engine(other)
    yield engine
    engine.dispose()


def test_all_migrations_together_give_the_tables_that_a_new_database_is_given_at_once(store, migrated):
    migrations.migrate(migrated)
    with migrated.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert schema(store.engine) == schema(migrated)


def test_a_database_of_an_older_version_is_migrated_when_it_is_opened(url):
    old = create_engine(url)
    with old.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
    old.dispose()
    store = open_store(url, VirtualClock())
    assert store.write(lambda tx: tx.add(machine())).id == 1
    store.close()


def test_the_head_that_lets_an_ordinary_start_skip_the_migrations_is_the_newest_one():
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_current_head() == migrations.HEAD


def test_opening_a_database_again_changes_nothing(store, url):
    stored = store.write(lambda tx: tx.add(machine()))
    again = open_store(url, VirtualClock())
    assert again.read(lambda tx: tx.get(m.Machine, stored.id)) == stored
    again.close()


@on_sqlite
def test_sqlite_is_opened_so_that_a_commit_survives_a_power_cut(store):
    with store.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_ids_are_never_used_twice(store):
    first = store.write(lambda tx: tx.add(machine("a")))
    store.write(lambda tx: tx.remove(m.Machine, CODECS[m.Machine].table.c.id == first.id))
    second = store.write(lambda tx: tx.add(machine("b")))
    assert second.id > first.id


def test_a_row_that_somebody_else_changed_is_not_overwritten(store):
    seen = store.write(lambda tx: tx.add(machine()))
    store.write(lambda tx: tx.put(replace(seen, strikes=1)))
    with pytest.raises(Conflict, match="changed by somebody else"):
        store.write(lambda tx: (tx.add(machine("other")), tx.put(replace(seen, strikes=2))))
    assert store.read(lambda tx: [found.strikes for found in tx.select(m.Machine)]) == [1]


def test_putting_a_row_twice_in_one_transaction_keeps_the_last(store):
    seen = store.write(lambda tx: tx.add(machine()))

    def twice(tx):
        once = tx.put(replace(seen, strikes=1))
        tx.put(replace(once, retired=True))

    store.write(twice)
    found = store.read(lambda tx: tx.get(m.Machine, seen.id))
    assert (found.strikes, found.retired, found.version) == (1, True, 1)


def test_putting_an_outdated_row_within_one_transaction_conflicts(store):
    seen = store.write(lambda tx: tx.add(machine()))
    with pytest.raises(Conflict):
        store.write(lambda tx: (tx.put(replace(seen, strikes=1)), tx.put(replace(seen, retired=True))))


def test_a_batch_drops_only_what_conflicts(store):
    a, b = (store.write(lambda tx, n=n: tx.add(machine(n))) for n in "ab")
    store.write(lambda tx: tx.put(replace(a, strikes=9)))
    outcome = each(store, [lambda tx: tx.put(replace(a, strikes=1)), lambda tx: tx.put(replace(b, strikes=1))])
    assert [type(one) for one in outcome] == [Conflict, m.Machine]
    assert store.read(lambda tx: [found.strikes for found in tx.select(m.Machine)]) == [9, 1]


def test_what_raises_leaves_nothing_behind(store):
    def half(tx):
        tx.add(machine())
        tx.add_later(m.Event(0, 1, "t", "machine", "x"))
        raise NotFound("in the middle")

    feed = store.feed()
    feed.drain()
    with pytest.raises(NotFound):
        store.write(half)
    assert store.read(lambda tx: (tx.select(m.Machine), tx.select(m.Event))) == ([], [])
    assert feed.drain() == ([], True)


def test_a_feed_tells_what_was_committed_in_order_and_a_new_reader_that_it_knows_nothing(store):
    feed = store.feed()
    assert feed.drain() == ([], False)
    added = store.write(lambda tx: tx.add(machine()))
    changed = store.write(lambda tx: tx.put(replace(added, strikes=1)))
    assert feed.drain() == ([added, changed], True)


def test_rows_inserted_later_come_to_the_feed_with_their_ids(store):
    feed = store.feed()
    feed.drain()
    store.write(lambda tx: [tx.add_later(m.Operation(0, n, "k", m.OperationState.PENDING, 1)) for n in (5, 6, 7)])
    changes, _ = feed.drain()
    assert [(record.machine_id, record.id) for record in changes] == [(5, 1), (6, 2), (7, 3)]


@on_sqlite
def test_a_locked_database_is_waited_for_and_nothing_is_lost(store, tmp_path, caplog, monkeypatch):
    other = sqlite3.connect(tmp_path / "nodepool.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    waiting = threading.Event()
    said = lambda record: waiting.set() if "waiting for the database" in record.getMessage() else None  # noqa: E731
    monkeypatch.setattr(caplog.handler, "emit", said)  # pytest has one handler for all tests: it is given back
    writer = threading.Thread(target=lambda: store.write(lambda tx: tx.add(machine())))
    writer.start()
    assert waiting.wait(5), "nobody said that the database is locked"
    other.execute("COMMIT")
    writer.join(10)
    other.close()
    assert len(store.read(lambda tx: tx.select(m.Machine))) == 1


@on_sqlite
def test_a_database_that_stays_locked_is_unavailable_in_one_sentence(store, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 0.3)
    other = sqlite3.connect(tmp_path / "nodepool.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        store.write(lambda tx: tx.add(machine()))
    other.close()


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname in {"ERROR", "WARNING"}]


@on_sqlite
def test_a_full_disk_is_said_once_with_its_remedy_and_when_there_is_room_all_goes_on(store, caplog):
    store.write(lambda tx: tx.add(machine()))
    with store.engine.connect() as connection:
        full = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {full}")
    big = [machine(f"m{number}", failure="x" * 1000) for number in range(20)]
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="disk is full; make room"):
            store.write(lambda tx: [tx.add(one) for one in big])
    assert len(store.read(lambda tx: tx.select(m.Machine))) == 1
    assert "disk is full" in store.trouble
    with store.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    store.clock.advance(engine.QUIET)
    store.write(lambda tx: [tx.add(one) for one in big])
    assert store.trouble == ""
    assert [" ".join(sentence.split()[:4]) for sentence in told(caplog)] == [
        "the database refused: database",
        "the database can be",
    ]


@on_sqlite
def test_a_database_file_that_is_taken_away_is_noticed_and_when_it_is_back_nothing_is_lost(store, tmp_path):
    path = tmp_path / "nodepool.db"
    store.write(lambda tx: tx.add(machine()))
    path.rename(tmp_path / "away")
    with pytest.raises(StoreUnavailable, match="removed or replaced"):
        store.write(lambda tx: tx.add(machine("b")))
    (tmp_path / "away").rename(path)
    store.write(lambda tx: tx.add(machine("b")))
    assert len(store.read(lambda tx: tx.select(m.Machine))) == 2


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///:memory:"])
def test_an_address_that_is_none_is_a_problem_of_the_configuration(url):
    with pytest.raises(ConfigError, match="sqlite:///var/nodepool"):
        open_store(url, SystemClock())


def test_a_second_daemon_on_the_same_database_is_refused(store, lock):
    first = LocalReferee(store, lock(store))
    first.take_office()
    with pytest.raises(Refused, match="another nodepoold already runs"):
        LocalReferee(store, lock(store)).take_office()
    first.leave()
    second = LocalReferee(store, lock(store))
    assert second.take_office().epoch == 2
    second.leave()


def test_daemons_on_two_databases_of_one_server_do_not_shut_each_other_out(server):
    stores = [open_store(server(), VirtualClock()) for _ in range(2)]
    referees = [LocalReferee(store, server_lock(store.engine)) for store in stores]
    assert [referee.take_office().epoch for referee in referees] == [1, 1]
    for referee, store in zip(referees, stores, strict=True):
        referee.leave()
        store.close()


def test_who_is_out_of_office_writes_nothing(store, lock):
    referee = LocalReferee(store, lock(store))
    old = referee.take_office()
    referee.leave()
    new = LocalReferee(store, lock(store))
    office = new.take_office()
    with pytest.raises(OutOfOffice, match="no longer in office"):
        store.write(lambda tx: tx.add(machine()), old)
    store.write(lambda tx: tx.add(machine()), office)
    new.leave()
    assert len(store.read(lambda tx: tx.select(m.Machine))) == 1


@on_sqlite
def test_after_a_commit_whose_outcome_is_unknown_every_reader_reads_anew(store):
    feed = store.feed()
    feed.drain()

    def committed_but_not_said(connection):
        connection.connection.commit()
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    event.listen(store.engine, "commit", committed_but_not_said)
    with pytest.raises(StoreUnavailable, match="disk I/O error"):
        store.write(lambda tx: tx.add(machine()))
    event.remove(store.engine, "commit", committed_but_not_said)
    assert len(store.read(lambda tx: tx.select(m.Machine))) == 1
    assert feed.drain() == ([], False)
