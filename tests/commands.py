"""The command line in a process of its own, one command after another: importing it takes seconds.

Reads a line [token, argument, ...] and answers with a line [exit code, what was said], in JSON.
"""

import contextlib
import io
import json
import os
import sys
import time

if __name__ == "__main__":
    from ecodiff import cli

    time.sleep = lambda _: None  # nobody waits for the Hub's client to try again
    answers = sys.stdout
    for line in sys.stdin:
        os.environ["HF_TOKEN"], *arguments = json.loads(line)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(arguments)
        print(json.dumps([code, said.getvalue()]), file=answers, flush=True)
