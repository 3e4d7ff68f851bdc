"""profiles/cluster-generic with stand-ins for PBS."""

import os
import stat

import pytest

pytest.importorskip("snakemake_executor_plugin_cluster_generic", reason="the plugin is missing")

# The first job is lost, as when its node fails.
QSUB = """#!/bin/bash
cd {folder}
id=$(($(wc -l < asked.txt) + 1))
echo "${{@:1:$#-1}}" >> asked.txt
if [ $id = 1 ]; then echo 271 > $id; else (cd {work}; sh "${{@: -1}}"; echo $? > {folder}/$id) > {folder}/$id.log 2>&1 & fi
echo $id
"""
QSTAT = """#!/bin/bash
echo "Job Id: $2"
if [ -s {folder}/$2 ]
then echo "    job_state = F"; echo "    Exit_status = $(cat {folder}/$2)"
else echo "    job_state = R"
fi
"""


@pytest.fixture
def pbs(finished_copy, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("qsub", QSUB), ("qstat", QSTAT)):
        (folder / name).write_text(text.format(folder=folder, work=finished_copy.folder))
        (folder / name).chmod(stat.S_IRWXU)
    (folder / "asked.txt").touch()
    return folder


def test_jobs_go_to_the_engine_and_again_when_they_are_lost(pbs, finished_copy, repository):
    place = finished_copy
    (stamp,) = place.folder.glob("results/distill/all/*.stamp")
    (track,) = place.folder.glob("results/track/teacher/*.json")
    for path in (stamp, track):
        path.unlink()
    profile = ("--workflow-profile", str(repository / "profiles/cluster-generic"))
    wanted = (str(path.relative_to(place.folder)) for path in (stamp, track))
    done = place.run(*profile, *wanted, cores=None, PATH=f"{pbs}:{os.environ['PATH']}")
    assert done.status == 0, done.output
    assert stamp.exists() and track.exists()
    line = (
        "-N distill_stage -j oe -o logs/cluster/"
        " -l select=1:ncpus=8:mem=16000mb:ngpus=1 -l walltime=43200"
    )
    assert (pbs / "asked.txt").read_text().splitlines() == [line, line]
    assert "Trying to restart job" in done.output
