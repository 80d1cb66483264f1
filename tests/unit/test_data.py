"""Documents, tokenizers, packing, token cache and loader. No device is needed."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from jaxpar.data import BatchOrder, DataError, PackedSource, build_loader, documents, load_tokenizer, open_dataset

TEXTS = ["the quick fox\n", "", "über ☃ naïve", "x"]


def write_jsonl(file: Path, texts, key="text") -> Path:
    file.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return file


def write_parquet(file: Path, columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
    return file


def write_tokenizer(folder: Path, special=("<|endoftext|>",), eos=None, words=("the", "quick", "fox", "x")) -> Path:
    vocab = {word: i for i, word in enumerate(("[UNK]", *words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(2)  # as in a careless tokenizer file; it must not cut documents
    tokenizer.enable_padding(length=9)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


def random_source(seq_length: int, lengths) -> PackedSource:
    """A source in which every token is its own index, so that a wrong one is noticed."""
    doc_ends = np.cumsum(lengths)
    return PackedSource(np.arange(doc_ends[-1], dtype=np.uint32), doc_ends, seq_length)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key, strict=True)


def concatenated(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


# Documents


def test_every_format_gives_the_same_documents(tmp_path):
    assert list(documents(write_jsonl(tmp_path / "a.jsonl", TEXTS, "body"), "body")) == TEXTS
    assert list(documents(write_jsonl(tmp_path / "b.json", TEXTS))) == TEXTS
    assert list(documents(write_parquet(tmp_path / "c.parquet", {"text": TEXTS, "n": [1, 2, 3, 4]}))) == TEXTS
    (tmp_path / "notes").write_bytes("\ufeffone\r\ntwo".encode())  # byte-order mark, no suffix
    assert list(documents(tmp_path / "notes")) == ["one\r\ntwo"]


def test_blank_lines_and_unicode_line_separators_do_not_split_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n\n  \n{"text": "c"}', encoding="utf-8")
    assert list(documents(tmp_path / "a.jsonl")) == ["a\u2028b", "c"]


def test_folder_is_read_in_sorted_order_without_hidden_or_other_files(tmp_path):
    (tmp_path / "sub" / ".cache").mkdir(parents=True)
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "sub" / "b.md").write_text("b")
    (tmp_path / "sub" / ".cache" / "c.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\xff\xfe")
    write_jsonl(tmp_path / "a.jsonl", ["a0", "a1"])
    assert list(documents(tmp_path)) == ["a0", "a1", "b", "z"]


def test_python_topics_are_real_text_on_every_machine():
    texts = list(documents("python:pydoc_data.topics"))
    assert sum(len(text.encode()) for text in texts) > 400_000
    assert texts == list(documents("python:pydoc_data.topics"))
    assert any("assert_stmt" in text or '"assert" statement' in text for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, ["data.train_data_paths", "missing.txt"]),
        ("a.txt", b"ok \xff", ["a.txt", "UTF-8", "0xff", "offset 3"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2", "invalid JSON"]),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 3}\n', ["line 2", "'text'", "data.text_key", "body, id"]),
        ("a.jsonl", b'["a"]\n', ["line 1", "list"]),
        ("a.jsonl", b'{"text": 3}\n', ["line 1", "int", "not a string"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("a.jsonl", b'{"text": "\xff"}\n', ["line 1", "UTF-8"]),
        ("a.parquet", b"not parquet", ["a.parquet", "Parquet"]),
    ],
)
def test_bad_files_say_where_and_what(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(documents(tmp_path / name))
    for word in words:
        assert word in str(error.value)


def test_other_bad_sources_say_where_and_what(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [1]})
    write_parquet(tmp_path / "null.parquet", {"text": ["a", "b", None]})
    (tmp_path / "empty").mkdir()
    for path, pattern in [
        (tmp_path / "a.parquet", r"'text' \(data.text_key\).*body, id"),
        (tmp_path / "null.parquet", "row 2.*NoneType"),
        (tmp_path / "empty", r"data.val_data_paths.*no file.*\.jsonl"),
        ("python:no_such_module.topics", "no_such_module.topics"),
        ("python:json.decoder", "'decoder'"),
    ]:
        with pytest.raises(DataError, match=pattern):
            list(documents(path, setting="data.val_data_paths"))


# Tokenizers


@pytest.mark.parametrize("name", [None, "byte"])
def test_byte_tokenizer(name):
    tokenizer = load_tokenizer(name)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.name) == (258, 256, "byte")
    ids = tokenizer.encode("aé")
    assert ids.dtype == np.int32 and ids.tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([*ids, 256, 257]) == "aé"


def test_file_tokenizer_neither_cuts_nor_pads(tmp_path):
    write_tokenizer(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(str(name))
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (6, 5)
        assert tokenizer.encode("the quick fox x x").tolist() == [1, 2, 3, 4, 4]
        assert [ids.tolist() for ids in tokenizer.encode_batch(["x", ""])] == [[4], []]
        assert tokenizer.encode("x").dtype == tokenizer.encode("").dtype == np.int32
        assert tokenizer.decode([1, 3, 5]) == "the fox"


def test_end_of_document_comes_from_the_configuration_or_is_the_only_candidate(tmp_path):
    two = ("</s>", "<|endoftext|>")
    write_tokenizer(tmp_path / "plain", two, eos="</s>")
    write_tokenizer(tmp_path / "added", two, eos={"content": "<|endoftext|>", "special": True})
    assert load_tokenizer(str(tmp_path / "plain")).eos_id == 5
    assert load_tokenizer(str(tmp_path / "added")).eos_id == 6
    for folder, pattern in [
        (write_tokenizer(tmp_path / "both", two), "more than one.*set .eos_token.*tokenizer_config.json"),
        (write_tokenizer(tmp_path / "none", ("<odd>",)), "no special token has a usual name"),
        (write_tokenizer(tmp_path / "unknown", eos="<gone>"), "'<gone>' is not in its vocabulary"),
    ]:
        with pytest.raises(DataError, match=pattern):
            load_tokenizer(str(folder))


def test_bad_tokenizer_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer file"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match=r"no such file.*does not download anything"):
        load_tokenizer("meta-llama/Llama-3-8B")


# Packing


def test_packed_sample_by_hand():
    source = random_source(4, [3, 5, 2])  # documents 0-2, 3-7, 8-9
    first, second, last = (source[i] for i in range(len(source)))
    assert_same(
        first,
        {
            "tokens": np.int32([0, 1, 2, 3]),
            "targets": np.int32([1, 2, 3, 4]),
            "loss_mask": np.float32([1, 1, 0, 1]),
            "segment_ids": np.int32([1, 1, 1, 2]),
            "positions": np.int32([0, 1, 2, 0]),
        },
    )
    assert second["tokens"].tolist() == [4, 5, 6, 7]
    assert second["loss_mask"].tolist() == [1, 1, 1, 0]
    assert second["positions"].tolist() == [0, 1, 2, 3]  # its document starts before the sample
    assert last["tokens"].tolist() == [8, 9, 0, 0]
    assert last["targets"].tolist() == [9, 0, 0, 0]
    assert last["loss_mask"].tolist() == [1, 0, 0, 0]
    assert last["segment_ids"].tolist() == [1, 1, 0, 0]
    assert last["positions"].tolist() == [0, 1, 0, 0]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("case", range(60))
def test_every_pair_within_a_document_is_a_target_exactly_once(case):
    rng = np.random.default_rng(case)
    lengths = np.append(rng.integers(1, rng.integers(2, 20), size=rng.integers(1, 30)), rng.integers(1, 4))
    seq_length = int(rng.integers(1, 12))
    if lengths.max() < 2:
        lengths[0] = 2
    source = random_source(seq_length, lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    pairs = []
    for sample in source:  # iterates over a sequence until IndexError
        mask = sample["loss_mask"] == 1
        pairs += zip(sample["tokens"][mask].tolist(), sample["targets"][mask].tolist(), strict=True)
        real = sample["segment_ids"] > 0
        tokens, segments, positions = (sample[key][real] for key in ("tokens", "segment_ids", "positions"))
        np.testing.assert_array_equal(np.diff(tokens), 1)
        np.testing.assert_array_equal(segments, document[tokens] - document[tokens[0]] + 1)
        for segment in np.unique(segments):
            np.testing.assert_array_equal(positions[segments == segment], np.arange((segments == segment).sum()))
    assert mask.any(), "the last sample must hold something to learn"
    assert pairs == [(i, i + 1) for i in range(len(document) - 1) if document[i] == document[i + 1]]


def test_nothing_to_predict_is_an_error():
    with pytest.raises(DataError, match="nothing to predict"):
        random_source(4, [1, 1, 1])
    with pytest.raises(DataError, match=r"runner\.seq_length: must be at least 1, got 0"):
        random_source(0, [3])


# Token cache


def test_open_dataset_holds_the_documents_and_skips_empty_ones(tmp_path):
    (tmp_path / "b.txt").write_text("last")
    paths = [write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "b.txt"]
    source = open_dataset(paths, tokenizer=load_tokenizer(None), seq_length=8, cache_dir=tmp_path / "cache")
    assert (source.num_documents, source.num_tokens) == (4, sum(len(t.encode()) + 1 for t in [*TEXTS, "last"] if t))
    assert source.tokens.dtype == np.uint16
    parts = np.split(np.asarray(source.tokens), source.doc_ends[:-1])
    assert [load_tokenizer(None).decode(part) for part in parts] == [t for t in [*TEXTS, "last"] if t]
    assert all(part[-1] == 256 for part in parts)


def test_large_vocabulary_is_stored_whole(tmp_path):
    words = [f"w{i}" for i in range(70_000)]
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "tok", words=words)))
    (tmp_path / "a.txt").write_text("w69999 w1")
    source = open_dataset([tmp_path / "a.txt"], tokenizer=tokenizer, seq_length=2, cache_dir=tmp_path / "cache")
    assert source[0]["tokens"].tolist() == [70_000, 2] and source[0]["targets"].tolist() == [2, 70_001]


class CountingTokenizer:
    """The byte tokenizer, which also counts its calls."""

    def __init__(self, fingerprint="byte"):
        self._tokenizer = load_tokenizer("byte")
        self.name, self.vocab_size, self.eos_id = "byte", 258, 256
        self.fingerprint, self.calls = fingerprint, 0

    def encode(self, text):
        return self._tokenizer.encode(text)

    def encode_batch(self, texts):
        self.calls += 1
        return self._tokenizer.encode_batch(texts)

    def decode(self, ids):
        return self._tokenizer.decode(ids)


def test_cache_is_reused_until_something_it_depends_on_changes(tmp_path):
    file, cache_dir = tmp_path / "a.jsonl", tmp_path / "cache"
    file.write_text('{"text": "abc", "body": "de"}\n')

    def opened(fingerprint="byte", text_key="text", seq_length=2):
        tokenizer = CountingTokenizer(fingerprint)
        options = {"text_key": text_key, "seq_length": seq_length, "cache_dir": cache_dir}
        source = open_dataset([file], tokenizer=tokenizer, **options)
        return tokenizer.calls, source.num_tokens

    assert opened() == (1, 4)
    assert opened() == (0, 4)
    assert opened(seq_length=3) == (0, 4)
    assert opened(text_key="body") == (1, 3)
    assert opened(fingerprint="other") == (1, 4)
    stat = file.stat()
    file.write_text('{"text": "abx", "body": "de"}\n')  # the same length as before
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert opened() == (1, 4)
    assert opened() == (0, 4)


def test_failure_leaves_no_cache(tmp_path):
    file, cache_dir = tmp_path / "a.jsonl", tmp_path / "cache"
    options = {"tokenizer": load_tokenizer(None), "seq_length": 2, "cache_dir": cache_dir}
    file.write_text('{"text": "abc"}\n{"nothing": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        open_dataset([file], **options)
    write_jsonl(file, ["", ""])
    with pytest.raises(DataError, match=r"data.train_data_paths.*no text"):
        open_dataset([file], **options)
    assert list(cache_dir.iterdir()) == []
    with pytest.raises(DataError, match=r"data.val_data_paths: is empty"):
        open_dataset([], setting="data.val_data_paths", **options)


RACER = """
import sys, time
from jaxpar.data import load_tokenizer, open_dataset
from jaxpar.data import cache
publish = cache._publish
def publish_late(*folders):  # both have tokenized by the time that either is done
    open(sys.argv[1] + "/ready" + sys.argv[2], "w").close()
    deadline = time.time() + 20
    while not all(cache.Path(sys.argv[1], "ready" + n).exists() for n in "01") and time.time() < deadline:
        time.sleep(0.01)
    publish(*folders)
cache._publish = publish_late
source = open_dataset(["python:pydoc_data.topics"], tokenizer=load_tokenizer(None), seq_length=64,
                      cache_dir=sys.argv[1] + "/cache")
print(source.num_tokens, sum(int(sample["targets"].sum()) for sample in source))
"""


def test_two_processes_may_build_one_cache_at_once(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [subprocess.Popen([*command, n], env=env, stdout=subprocess.PIPE, text=True) for n in "01"]
    outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists()
    assert outputs[0] == outputs[1] and int(outputs[0].split()[0]) > 400_000
    (folder,) = (tmp_path / "cache").iterdir()  # one cache, and nothing unfinished beside it
    assert sorted(file.name for file in folder.iterdir()) == ["counts.json", "doc_ends", "records", "tokens"]


# Loader


def source_of(num_samples: int) -> PackedSource:
    """Sample i holds the tokens 2 * i and 2 * i + 1, all in one document."""
    return random_source(2, [num_samples * 2 + 1])


def sample_numbers(batch):
    return (batch["tokens"][:, 0] // 2).tolist()


def test_epochs_are_different_permutations_and_nothing_is_lost_between_them():
    loader = build_loader(source_of(10), BatchOrder(4, seed=1, num_epochs=4))
    assert (loader.batches_per_epoch, loader.num_batches) == (2, 10)
    batches = list(loader)
    assert len(batches) == 10 and all(batch["tokens"].shape == (4, 2) for batch in batches)
    order = [number for batch in batches for number in sample_numbers(batch)]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and list(range(10)) not in epochs


def test_order_depends_on_the_seed_alone():
    def order(seed, num_batches=5):
        loader = build_loader(source_of(40), BatchOrder(8, seed=seed))
        return [number for batch in itertools.islice(loader, num_batches) for number in sample_numbers(batch)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    # The second epoch of seed 0 must differ from the first epoch of seed 1.
    assert order(0, 10)[40:] != order(1)


def test_without_shuffle_the_order_is_that_of_the_source_and_the_last_remainder_is_dropped():
    loader = build_loader(source_of(5), BatchOrder(2, seed=0, shuffle=False, num_epochs=1))
    assert [sample_numbers(batch) for batch in loader] == [[0, 1], [2, 3]]
    assert next(loader, None) is None


class Recording:
    """A source that records which samples were read."""

    def __init__(self, source):
        self.source, self.read = source, []

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.read.append(index)
        return self.source[index]


def test_processes_read_their_rows_only_and_together_have_the_whole_batch():
    order = BatchOrder(8, seed=3, num_epochs=2)
    whole = list(build_loader(source_of(20), order))
    sources = [Recording(source_of(20)) for _ in range(3)]
    rows = [[0, 1, 2, 3], [4, 5], [7, 6]]  # in the order of the request
    parts = [list(build_loader(source, order, rows=r)) for source, r in zip(sources, rows, strict=True)]
    for t, batch in enumerate(whole):
        joined = concatenated([part[t] for part in parts])
        assert_same({key: value[[0, 1, 2, 3, 4, 5, 7, 6]] for key, value in joined.items()}, batch)
    assert [len(source.read) for source in sources] == [5 * 4, 5 * 2, 5 * 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_before_and_after_iteration_begins(num_workers):
    options = {"order": BatchOrder(4, seed=5), "rows": [0, 2, 3]}
    expected = list(itertools.islice(build_loader(source_of(14), **options), 9))
    first = build_loader(source_of(14), num_workers=num_workers, **options)
    for t in range(3):
        assert first.get_state() == {"batch": t}
        batch = next(first)
        assert_same(batch, expected[t])
        assert all(type(value) is np.ndarray for value in batch.values())
    state = json.loads(json.dumps(first.get_state()))
    assert_same(next(first), expected[3])  # samples read ahead must not count in the state

    resumed = build_loader(source_of(14), **options)
    resumed.set_state(state)
    for loader in (first, resumed):
        loader.set_state(state)
        for t in range(3, 9):
            assert_same(next(loader), expected[t])
        assert loader.get_state() == {"batch": 9}
        loader.close()
    assert_same(next(resumed), next(first))
    first.close()


def test_resume_reads_nothing_that_lies_before():
    source = Recording(source_of(1000))
    loader = build_loader(source, BatchOrder(10, seed=0, shuffle=False))
    loader.set_state({"batch": 70})
    assert sample_numbers(next(loader)) == list(range(700, 710))
    loader.close()
    assert min(source.read) == 700


def test_workers_give_the_same_batches_and_map_the_cache(tmp_path):
    source = open_dataset(
        ["python:pydoc_data.topics"], tokenizer=load_tokenizer(None), seq_length=512, cache_dir=tmp_path
    )
    assert len(pickle.dumps(source)) < 1000  # not the corpus
    order = BatchOrder(300, seed=0, num_epochs=1)
    loader = build_loader(source, order, num_workers=2)
    for batch, expected in zip(loader, build_loader(source, order), strict=True):
        assert_same(batch, expected)
    assert loader.get_state() == {"batch": loader.num_batches}


def test_loader_errors():
    with pytest.raises(DataError, match=r"actor.global_batch_size: 4 is more than the 3 samples"):
        build_loader(source_of(3), BatchOrder(4, seed=0))
    for rows in ([], [4], [-1]):
        with pytest.raises(DataError, match="rows"):
            build_loader(source_of(8), BatchOrder(4, seed=0), rows=rows)
    with pytest.raises(DataError, match=r"data.seed: must be at least 0, got -1\nrunner.max_epochs: .* got 0"):
        BatchOrder(4, seed=-1, num_epochs=0)
    with pytest.raises(DataError, match=r"data.num_workers: must be at least 0, got -1"):
        build_loader(source_of(8), BatchOrder(4, seed=0), num_workers=-1)
    loader = build_loader(source_of(8), BatchOrder(4, seed=0, num_epochs=1))
    loader.set_state({"batch": 2})
    assert list(loader) == []
    for state in ({"batch": 3}, {"batch": -1}, {"batch": 1.0}, {}):
        with pytest.raises(DataError, match="not a position"):
            loader.set_state(state)


UNCLOSED = """
import sys, time
from jaxpar.data import BatchOrder, build_loader, load_tokenizer, open_dataset
if __name__ == "__main__":
    source = open_dataset(["python:pydoc_data.topics"], tokenizer=load_tokenizer(None), seq_length=64,
                          cache_dir=sys.argv[1])
    loader = build_loader(source, BatchOrder(4, seed=0), num_workers=1)
    next(loader)
    print("started", flush=True)
    if sys.argv[2] == "killed":
        time.sleep(60)
"""


@pytest.mark.parametrize("end", ["exits", "killed"])
def test_workers_end_with_a_program_that_never_closes_its_loader(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(UNCLOSED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script), str(tmp_path / "cache"), end]
    program = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "started\n"
    if end == "killed":
        program.kill()
    errors = program.communicate(timeout=30)[1]  # returns when no process holds the pipes any more
    if end == "exits":
        # If XLA's CUDA plugin is installed, it reports that it found no driver. Anything else would be a leak.
        notices = ("WARNING: All log messages before absl::InitializeLog()", "cudart_stub.cc")
        lines = [line for line in errors.splitlines() if not any(notice in line for notice in notices)]
        assert (program.returncode, lines) == (0, [])


def test_positions_go_through_if_tokens_attend_across_documents():
    tokens, doc_ends = np.arange(10, dtype=np.uint32), np.array([3, 7, 10])
    own = PackedSource(tokens, doc_ends, 8)
    across = PackedSource(tokens, doc_ends, 8, across_documents=True)
    assert own[0]["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    for source in (across, pickle.loads(pickle.dumps(across))):
        assert source[0]["positions"].tolist() == list(range(8))
        assert source[0]["segment_ids"].tolist() == own[0]["segment_ids"].tolist()
        assert source[0]["loss_mask"].tolist() == own[0]["loss_mask"].tolist()
