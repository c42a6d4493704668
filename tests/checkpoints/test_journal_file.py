"""Records that survive whatever the end of the file looks like."""

import pytest

from lit_specrl.checkpoints.journal_file import JournalFile, read_journal

IDENTITY = {"step": "3"}
RECORDS = {bytes([i]) * 16: bytes(range(i)) for i in (1, 2, 3)}


@pytest.fixture
def path(tmp_path):
    """A file with three records."""
    path = tmp_path / "folder" / "file"
    write(path, RECORDS)
    return path


def write(path, records, identity=IDENTITY):
    journal = JournalFile(path, identity)
    found = journal.found
    journal.append(records)
    journal.sync()
    journal.close()
    journal.wait()
    assert journal.num_bytes == path.stat().st_size
    return found


def test_a_file_that_ends_anywhere_gives_its_whole_records_and_grows_on(path):
    data = path.read_bytes()
    numbers = []
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        _, found, _ = read_journal(path)
        assert RECORDS.items() >= found.items()
        numbers.append(len(found))
        assert write(path, RECORDS) == found
        assert read_journal(path)[:2] == (IDENTITY, RECORDS)
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2, 3}


def test_nothing_behind_a_changed_byte_is_believed(path):
    data = path.read_bytes()
    for position in range(len(data)):
        spoiled = bytearray(data)
        spoiled[position] ^= 255
        path.write_bytes(spoiled)
        identity, found, _ = read_journal(path)
        assert identity in (None, IDENTITY)
        assert RECORDS.items() > found.items()


def test_records_of_another_identity_are_replaced(path):
    assert write(path, {bytes(16 * [9]): b"new"}, {"step": "4"}) == {}
    assert read_journal(path)[:2] == ({"step": "4"}, {bytes(16 * [9]): b"new"})


def test_what_is_not_there_has_no_records(tmp_path):
    assert read_journal(tmp_path / "none") == (None, {}, 0)
