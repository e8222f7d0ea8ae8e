"""A sweep in a line: jobs through, failed, and how far those are that run."""

import io
import json
import pickle
import sys
from pathlib import Path

from omegaconf import OmegaConf

from sdd.cli.progress import Progress, bars_into, number_of_jobs

BAR = "\rtune:   0%|          | 0/64 [00:00<?, ?step/s]"
BAR += "\rtune:  45%|████▌     | 29/64 [00:10<00:12,  2.80step/s, loss=0.4]\x1b[A"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_jobs_done_failed_and_running(tmp_path):
    write(tmp_path / "9" / "result.json", "{}")  # of an earlier sweep in the same folder
    progress = Progress(tmp_path, 12)
    assert progress.line() == "0 of 12 jobs done"
    write(tmp_path / "0" / "progress.log", "tune: 100%")
    write(tmp_path / "0" / "result.json", json.dumps({"path": "somewhere"}))
    write(tmp_path / "1" / "result.json", json.dumps({"error": "no such thing"}))
    write(tmp_path / "10" / "progress.log", "")
    write(tmp_path / "2" / "progress.log", f"loading\n{BAR}")
    write(tmp_path / "2" / "train.log", "[..] scores/ab built in 3 s\n[..] building tuned/0123456789ab\n")
    bar = "tuned, tune: 45% 29/64 [00:10<00:12, 2.80step/s, loss=0.4]"
    assert progress.line() == f"2 of 12 jobs done, 1 of them failed; running: #2 {bar}; #10 begun"
    stream = io.StringIO()
    progress.show(stream)
    progress.show(stream)
    assert stream.getvalue() == f"[sweep] {progress.line()}\n"
    assert pickle.loads(pickle.dumps(progress)).line() == progress.line()


def test_bars_go_into_the_jobs_folder_and_what_kept_the_stream_goes_on(tmp_path, capsys):
    with bars_into(tmp_path):
        kept = sys.stderr
        print("a bar", file=sys.stderr)
    print("afterwards", file=kept)
    assert (tmp_path / "progress.log").read_text() == "a bar\n"
    assert capsys.readouterr().err == "afterwards\n"


def test_how_many_jobs_a_sweep_comes_to():
    hydra = {"sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None}}
    hydra["sweeper"]["params"] = {"seed": "0,1,2,3,4", "finetune": "sft,none"}
    hydra["overrides"] = {"task": ["seed=0,1,2", "pruning=n2"]}
    assert number_of_jobs(OmegaConf.create({"hydra": hydra})) == 6
    hydra["sweeper"]["_target_"] = "another.Sweeper"
    assert number_of_jobs(OmegaConf.create({"hydra": hydra})) is None
