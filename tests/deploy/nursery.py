"""Makes processes of splitft's commands by forking one that has imported everything: a real process each, without seconds of imports.

Run as a script. Each line of the standard input is a JSON table: `arguments`, `log`, `environment` and `limits` begin a process, whose
number is answered; `wait` [number] answers its exit status once it has ended, or null. Nothing here has threads, so forking is safe.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, NoReturn


def import_all() -> None:
    """What servers and clients import, the test's model family included."""
    import grpc.aio
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    import splitft.apps.cli
    import splitft.apps.client_command
    import splitft.apps.server_command
    import splitft.apps.session
    import splitft.catalog

    assert all((grpc, transformers, splitft, AutoTokenizer, PreTrainedTokenizerFast))


def child(order: dict[str, Any]) -> NoReturn:
    """Become a command; ends with its exit code."""
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(order["environment"])
        for name, value in order["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, resource.getrlimit(getattr(resource, name))[1]))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if order["limits"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write, as a full disk gives, not a death
        from splitft.apps.cli import main

        main(order["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    import_all()
    ended: dict[int, int] = {}
    alive: set[int] = set()
    print(json.dumps({"threads": len(os.listdir("/proc/self/task"))}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            number = order["wait"]
            if number not in ended:
                found, status = os.waitpid(number, os.WNOHANG)
                if found:
                    ended[number] = os.waitstatus_to_exitcode(status)
            print(json.dumps(ended.get(number)), flush=True)
            continue
        number = os.fork()
        if number == 0:
            child(order)
        alive.add(number)
        print(json.dumps(number), flush=True)
    for number in alive - set(ended):  # whoever gave the orders has gone
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


if __name__ == "__main__":
    main()
