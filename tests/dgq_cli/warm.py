"""`dgq` in forks of a process that has imported what the commands import: a line of JSON asks for each.

Reads {"arguments", "cwd", "environment", "out", "err"} from stdin, writes the exit code to stdout. Importing torch,
diffusers and transformers takes a command longer than what most tests want of it.
"""

import importlib
import json
import os
import sys

MODULES = (
    "dgq.bench.steps",
    "dgq.bench.layers",
    "dgq.calibration.run",
    "dgq.doctor",
    "dgq.evaluation.evaluate",
    "dgq.inspection.inspect",
    "dgq.inspection.measurement",
    "dgq.tuning.train",
    "dgq.pictures.generation",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
)


def run(request):
    """In the fork: the command, with the streams of a process of its own."""
    for number, path, mode in ((0, os.devnull, "r"), (1, request["out"], "w"), (2, request["err"], "w")):
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["dgq", *request["arguments"]]
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    from dgq_cli.main import main

    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve():
    for name in MODULES:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
