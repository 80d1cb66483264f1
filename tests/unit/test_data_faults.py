"""What damaged data, odd folders and a damaged token cache lead to. No device is needed."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxpar.data import DataError, PackedSource, documents, load_tokenizer, open_dataset, token_cache
from jaxpar.data.text import left_out

LINES = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(1000)).encode()
TEXTS = [f"document {i}" for i in range(1000)]
COMPRESSED = {
    ".gz": gzip.compress(LINES),
    ".bz2": bz2.compress(LINES),
    ".xz": lzma.compress(LINES),
    ".zst": pyarrow.compress(LINES, codec="zstd", asbytes=True),
}


def write(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# Files


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_files_are_read_and_a_cut_one_is_named(tmp_path, suffix):
    content = COMPRESSED[suffix]
    assert list(documents(write(tmp_path / f"a/x.jsonl{suffix}", content).parent)) == TEXTS
    assert list(documents(write(tmp_path / f"twice.jsonl{suffix}", content * 2))) == TEXTS * 2
    for name, damaged in (("cut", content[: len(content) // 2]), ("junk", b"junk" * 9)):
        with pytest.raises(DataError, match=rf"{name}\.jsonl{suffix}.*(cannot be read|invalid JSON)"):
            list(documents(write(tmp_path / f"{name}.jsonl{suffix}", damaged)))


def test_csv_gives_its_column(tmp_path):
    long = "x" * 500_000  # longer than Python's limit of a field
    file = write(tmp_path / "a.csv", f'\ufeffid,text\n1,"a, ""b""\nc"\n\n2,{long}\n'.encode())
    assert list(documents(file)) == ['a, "b"\nc', long]
    assert list(documents(write(tmp_path / "b.tsv.gz", gzip.compress(b"body\tid\na,b\t1\n")), "body")) == ["a,b"]
    for content, words in [
        (b"id,text\n1,a\n2,b,c\n", "row 2, which ends in line 3: 3 fields, but the header has 2"),
        (b'id,text\n1,a\n2,"b', "cannot be read after record 1"),
        (b"id,body\n1,a\n", "no field 'text'.*id, body"),
        (b"id,text\n1,\xff\n", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=words):
            list(documents(write(tmp_path / "bad.csv", content)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "b", "n": ' + b"1" * 5000 + b"}", "line 2: invalid JSON .*4300 digits"),
        (b'{"text": "b", "n": ' + b"[" * 200_000, "line 2: invalid JSON .*recursion"),
        (b'{"text": "b", "n": 1e}', "line 2: invalid JSON"),
    ],
)
def test_numbers_and_nesting_that_json_cannot_hold(tmp_path, line, words):
    with pytest.raises(DataError, match=rf"a\.jsonl, {words}"):
        list(documents(write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line)))


def test_damaged_parquet_is_named_and_never_read_wrongly(tmp_path):
    """Pages have checksums if the writer gave them some."""
    table, file = pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file, row_group_size=100, write_page_checksum=True)
    content, rng, damaged = file.read_bytes(), np.random.default_rng(0), 0
    for start in rng.integers(0, len(content) - 8, 60):
        write(tmp_path / "bad.parquet", content[:start] + rng.bytes(8) + content[start + 8 :])
        try:
            assert list(documents(tmp_path / "bad.parquet")) == TEXTS  # of no consequence
        except DataError as error:
            damaged += 1
            assert "bad.parquet: cannot be read" in str(error) and len(error.problems) == 1
    assert damaged > 40
    raw = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"ok", b"\xff\xfe"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), file)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read after record 1 .*utf-8"):
        list(documents(file))


# Folders


def test_linked_folders_are_followed_but_never_in_a_circle(tmp_path):
    write(tmp_path / "elsewhere/b.txt", b"b")
    write(tmp_path / "data/a.txt", b"a")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    assert list(documents(tmp_path / "data")) == ["a", "b"]


def test_a_link_to_nothing_is_an_error(tmp_path):
    write(tmp_path / "a.txt", b"a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"b\.txt is a link to .*gone\.txt, which does not exist"):
        list(documents(tmp_path))


def test_files_that_are_not_read_are_counted(tmp_path):
    for name in ("a.txt", "b.png", "c.png", "d.warc.gz", ".hidden.txt", "README"):
        write(tmp_path / name, b"text")
    assert left_out(tmp_path / "a.txt") == left_out("python:pydoc_data.topics") == ""
    notes: list[str] = []
    options = {"tokenizer": load_tokenizer(None), "cache_dir": tmp_path / "cache"}
    token_cache([tmp_path], say=notes.append, **options)
    (note,) = notes
    for part in ("5 files", "2 .png", "1 .gz", "1 hidden", "1 without a suffix"):
        assert part in note


@pytest.mark.parametrize("path", ["", "  ", "~nosuchuser/data", "a\0b", "x" * 5000])
def test_paths_that_are_none(path):
    with pytest.raises(DataError, match=r"data\.train_data_paths: "):
        list(documents(path))


# The token cache


@pytest.fixture
def cached(tmp_path):
    """A function that opens the same corpus of 16,000 tokens, and the notes of its last call."""
    file, notes = write(tmp_path / "a.jsonl", LINES), []

    def opened(seq_length=8) -> PackedSource:
        notes.clear()
        options = {"tokenizer": load_tokenizer(None), "cache_dir": tmp_path / "cache", "say": notes.append}
        return PackedSource.read(token_cache([file], **options), seq_length)

    opened.notes = notes
    return opened


def damage_ids(folder: Path) -> None:
    with (folder / "tokens").open("r+b") as file:
        file.seek(5000)
        file.write(np.uint16(60_000).tobytes())


def damage_one_bit(folder: Path) -> None:
    content = bytearray((folder / "tokens").read_bytes())
    content[7000] ^= 1
    (folder / "tokens").write_bytes(content)


def damage_ends(folder: Path) -> None:
    (folder / "doc_ends").write_bytes(bytes((folder / "doc_ends").stat().st_size))


def damage_counts(folder: Path) -> None:
    text = (folder / "counts.json").read_text()
    (folder / "counts.json").write_text(text.replace('"num_documents": 1000', '"num_documents": 999'))


DAMAGES = {
    "ids beyond the vocabulary": damage_ids,
    "one bit": damage_one_bit,
    "ends": damage_ends,
    "counts": damage_counts,
    "cut": lambda folder: os.truncate(folder / "tokens", 3),
    "file gone": lambda folder: (folder / "records").unlink(),
    "counts empty": lambda folder: (folder / "counts.json").write_text(""),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_is_written_anew_with_a_note(cached, kind):
    good = cached()
    assert cached.notes == []
    tokens = np.asarray(good.tokens)
    DAMAGES[kind](good.folder)
    again = cached()
    assert len(cached.notes) == 1 and "is damaged and is written anew" in cached.notes[0]
    np.testing.assert_array_equal(np.asarray(again.tokens), tokens)
    cached()
    assert cached.notes == []
    assert list(good.folder.parent.iterdir()) == [good.folder]


def test_each_process_reads_its_share_and_all_learn_of_the_damage(cached, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxpar.data.cache._BLOCK", 1 << 10)
    folder = cached().folder
    damage_one_bit(folder)  # in block 6 of the tokens
    from jaxpar.data.cache import TokenCache

    found = [TokenCache(folder).damage(share, 4) for share in range(4)]
    assert [bool(text) for text in found] == [False, False, True, False]
    notes: list[str] = []
    options = {"tokenizer": load_tokenizer(None), "cache_dir": tmp_path / "cache", "say": notes.append}
    answers = iter([found, [""], [""]])  # process 0 finds nothing itself, but hears of it
    token_cache([tmp_path / "a.jsonl"], process=(0, 4), gather=lambda own: next(answers), **options)
    assert "written anew" in notes[0] and TokenCache(folder).damage() == ""


def test_a_cache_that_is_cut_or_altered_while_it_is_read_is_an_error_and_no_bus_error(cached):
    source = cached()
    first = source[0]
    damage_ids(source.folder)
    with pytest.raises(DataError, match=r"token cache .* is damaged \(tokens has the number 60000, outside 0 … 257\)"):
        [source[i] for i in range(len(source))]
    os.truncate(source.folder / "tokens", 100)
    np.testing.assert_array_equal(source[0]["tokens"], first["tokens"])
    with pytest.raises(DataError, match=r"tokens has been cut to 100 bytes.*start the run again"):
        source[len(source) - 1]
    os.truncate(source.folder / "doc_ends", 0)
    with pytest.raises(DataError, match="doc_ends has been cut"):
        source[0]


def test_what_killed_processes_left_is_removed(cached):
    cache_dir = cached().folder.parent
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    names = {
        f"k-unfinished-{host}-{gone.pid}-abc": False,
        f"k-unfinished-{host}-{os.getpid()}-abc": True,
        "k-unfinished-other-7-abc": True,
        "k-unfinished-other-8-old": False,
    }
    for name in names:
        write(cache_dir / name / "k/tokens", b"half")
    for path in (cache_dir / "k-unfinished-other-8-old/k/tokens", *cache_dir.glob("*old/k"), *cache_dir.glob("*old")):
        os.utime(path, (0, 0))
    cached()
    assert {name: (cache_dir / name).exists() for name in names} == names


class WrongTokenizer:
    name, vocab_size, eos_id, fingerprint = "wrong", 100, 99, "wrong"

    def encode_batch(self, texts):
        return [np.int32([0, 150]) for _ in texts]


def test_a_tokenizer_that_gives_ids_beyond_its_vocabulary_is_an_error(tmp_path):
    file = write(tmp_path / "a.jsonl", LINES)
    with pytest.raises(DataError, match=r"a\.jsonl, record 1: wrong gives ids outside 0 … 99"):
        open_dataset([file], tokenizer=WrongTokenizer(), seq_length=8, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
