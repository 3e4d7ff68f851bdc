"""Bad input: a sentence within seconds, and nothing lost."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

IMPORTED_TORCH = re.compile(r"^import time:.*\| +torch$", re.MULTILINE)

# What is wrong: changes of params.yaml, or arguments of Snakemake; and the sentence.
AT_PARSE_TIME = {
    "unknown key": (
        {"prune__magic": 1},
        [],
        "params.yaml: unknown key prune.magic; allowed here: method, seed, tokens, max_ratio,",
    ),
    "misspelt key": (
        {"evaluate__batch_sise": 64},
        [],
        "params.yaml: unknown key evaluate.batch_sise (did you mean batch_size?)",
    ),
    "wrong type": ({"data__n_samples": "many"}, [], 'params.yaml: data.n_samples is "many": '),
    "ratio 0": ({"prune__ratio": 0}, [], "params.yaml: prune.ratio is 0: "),
    "unknown section, --config": (
        {},
        ["--config", "prun=1"],
        "unknown key prun (did you mean prune?)",
    ),
    "ratio 0, --config": ({}, ["--config", "prune={ratio: 0}"], 'prune.ratio is "0": '),
}


def contents(place):
    """Every file's size and time; without Snakemake's own."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in place.folder.rglob("*")
        if ".snakemake" not in path.parts and path.is_file()
    }


@pytest.fixture(scope="module")
def told_at_parse_time(finished, tmp_path_factory):
    """By case: how the run ended, and whether the folder holds what it held."""

    def run(case):
        changes, arguments, _ = case
        place = finished.copy(tmp_path_factory.mktemp("bad") / "copy").edit(**changes)
        before = contents(place)
        done = place.run(*arguments, PYTHONPROFILEIMPORTTIME="1")
        return done, contents(place) == before

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(AT_PARSE_TIME, pool.map(run, AT_PARSE_TIME.values()), strict=True))


@pytest.mark.parametrize("case", AT_PARSE_TIME)
def test_bad_params_are_told_at_parse_time(told_at_parse_time, case):
    done, nothing_lost = told_at_parse_time[case]
    sentence = AT_PARSE_TIME[case][2]
    said = [line for line in done.output.splitlines() if not line.startswith("import time:")]
    assert done.status != 0
    assert any(sentence in line for line in said), "\n".join(said)
    assert not any("Traceback" in line for line in said)
    assert done.seconds < 10 and not IMPORTED_TORCH.search(done.output)
    assert nothing_lost


def parquet(**columns):
    def write(path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), path)

    return write


TABLE = {"data__source": "table", "data__table": "table.parquet", "data__urls": "file"}
IN_CHECK_JOB = {
    "unknown model": (
        {"teacher__model": "vit_of_nowhere"},
        None,
        "dgmr: teacher.model: timm knows no model vit_of_nowhere;",
    ),
    "missing teacher file": (
        {"teacher__model": "local-dir:resources/teachers/other"},
        None,
        "dgmr: teacher.model: resources/teachers/other/config.json is missing;",
    ),
    "ratio above the teacher's": (
        {"prune__ratio": 5.0, "prune__max_ratio": 6.0},
        None,
        "dgmr: prune: blocks.0.mlp would keep 160 hidden units, but it has 128 (4 times its embed dim)",
    ),
    "missing column": (
        TABLE,
        parquet(LINK=["a.png"], punsafe=[0.0]),
        "dgmr: data.table: table.parquet has no column url (needed to find the images);"
        " it has LINK, punsafe.",
    ),
    "unreadable table": (
        TABLE,
        lambda path: path.write_text("URL,TEXT\n"),
        "dgmr: data.table: table.parquet cannot be read as Parquet:",
    ),
}


@pytest.fixture(scope="module")
def told_by_check_job(new_place):
    """By case: how the run ended, and which files it left."""

    def run(case):
        changes, write_table, _ = case
        place = new_place(**changes)
        if write_table is not None:
            write_table(place / "table.parquet")
        before = set(contents(place))
        done = place.run()
        left = {str(path.relative_to(place.folder)) for path in set(contents(place)) - before}
        return done, left

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(IN_CHECK_JOB, pool.map(run, IN_CHECK_JOB.values()), strict=True))


@pytest.mark.parametrize("case", IN_CHECK_JOB)
def test_what_params_alone_cannot_tell_is_told_before_any_work(told_by_check_job, case):
    done, left = told_by_check_job[case]
    assert done.status != 0
    assert any(line.startswith(IN_CHECK_JOB[case][2]) for line in done.output.splitlines()), (
        done.output
    )
    assert "Traceback" not in done.output
    assert left - {"work/hashes.json"} == {"logs/check.log"}  # no other job ran
