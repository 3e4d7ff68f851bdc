"""Run ``dgmr`` commands in forks of one process that has torch imported already.

A line of JSON on standard input is a request: ``{"run": [arguments], "output", "env", "hooks"}`` forks
and answers with the process id; ``{"wait": pid, "seconds"}`` answers with its status as
:mod:`subprocess` has it, or null where it has not ended.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback

import pandas  # noqa: F401 - what reading Parquet would import in every fork
import torch
from dgmr import cli
from dgmr.distill import checkpoints, learner, trainer
from PIL import Image


class Steps:
    """What the hooks know of the step that is being done."""

    now = rank = 0
    seed = staticmethod(trainer._seed)
    when_one_begins = []


def log(path):
    """Append step, rank and pairs of what the student sees."""

    def seen(_self, batch):
        line = json.dumps([Steps.now, Steps.rank, batch.pairs]) + "\n"
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())

    _before_measuring(seen)


def forget():
    """No checkpoint is ever found."""
    checkpoints.newest = lambda _folder: None


def lose(prefix):
    """Checkpoints lack the tensors of one kind."""
    state = learner.Learner.state
    learner.Learner.state = lambda self: (t for t in state(self) if not t[0].startswith(prefix))


def drift():
    """Random numbers go on from whatever was drawn before."""
    Steps.seed = lambda *_: None


def signals(at, numbers, to_group=False):
    """In step ``at`` come these signals, to this process or to all of its group."""

    def send():
        for number in numbers if Steps.now == at else ():
            (os.killpg if to_group else os.kill)(0 if to_group else os.getpid(), number)
            time.sleep(0.2)

    Steps.when_one_begins.append(send)


def pause(at, until):
    """Step ``at`` begins when there is a file ``until``."""

    def wait():
        while Steps.now == at and not os.path.exists(until):
            time.sleep(0.01)

    Steps.when_one_begins.append(wait)


def impatient(seconds):
    """So long it waits for another process that trains the same run."""
    trainer._LONGEST_WAIT_S = seconds


def stop_soon():
    """A SIGTERM comes once it has been waiting."""
    asked = trainer.summed
    rounds = []

    def summed(*given):
        rounds.append(1)
        if len(rounds) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(*given)

    trainer.summed = summed


def careless():
    """It looks for no other process."""
    trainer.alone = lambda *_: contextlib.nullcontext()


def poison(steps, rank=0, rows=(0,)):
    """In these steps the teacher's answers are no numbers, in some rows of what ``rank`` gets."""

    def put(_self, batch):
        if Steps.now in steps and Steps.rank == rank:
            batch.answers["pooled"][list(rows)] = torch.nan

    _before_measuring(put)


def explode(steps, rank=0):
    """In these steps a gradient is infinite, and the loss is not."""
    made = learner.Learner.__init__

    def init(self, *arguments):
        made(self, *arguments)

        def change(gradient):
            return gradient * torch.inf if Steps.now in steps and Steps.rank == rank else gradient

        dict(self.student.named_parameters())["blocks.1.mlp.fc2.bias"].register_hook(change)

    learner.Learner.__init__ = init


def _before_measuring(act):
    measure = learner.Learner.measure

    def measured(self, batch, *arguments):
        act(self, batch)
        return measure(self, batch, *arguments)

    learner.Learner.measure = measured


def _told(seed, step, rank):
    Steps.now, Steps.rank = step, rank
    for act in Steps.when_one_begins:
        act()
    Steps.seed(seed, step, rank)


HOOKS = {
    hook.__name__: hook
    for hook in (
        log,
        forget,
        lose,
        drift,
        signals,
        pause,
        impatient,
        stop_soon,
        careless,
        poison,
        explode,
    )
}


def _become(request):
    """Do what the command does, in a session of its own."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    trainer._seed = _told
    for name, arguments in request["hooks"].items():
        HOOKS[name](**arguments)
    sys.argv = ["dgmr", *request["run"]]
    try:
        cli.main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _waited(pid, seconds):
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def main():
    """Serve until the requests end."""
    Image.init()
    trainer.code("dgmr.distill.trainer")  # reads our own modules once for all
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            answer = os.fork()
            if answer == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return _become(request)
        else:
            answer = _waited(request["wait"], request["seconds"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
