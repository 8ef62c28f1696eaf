"""Ray's worker processes, forked from one that has imported everything: they begin at once, not after 5 s of imports.

    raylet ── starts ──> `hand_on` (this file, as the runtime environment's `py_executable`)
                            │ arguments, environment, directory, standard output and error
                            v
    `serve` (one process, with torch and transformers) ── forks ──> the worker, otherwise as Ray would have started it

Ray knows a worker by the process id that it registers, so it can be watched and killed like any other. Imports at the
top are few, for this file is run anew for each worker.
"""

import json
import os
import signal
import socket
import sys

OUTPUTS = (1, 2)
"""Which Ray redirects into its logs."""

WARM = ("cluster.worker", "transformers.models.llama.modeling_llama")
"""Modules that workers find imported; Ray's are not among them, for they take in the environment of their process."""


def hand_on(address: str, arguments: list[str]) -> None:
    """Have a worker forked with these arguments, and last as long as it does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], OUTPUTS)
        server.sendall(request)
        server.recv(1)  # nothing ever comes; the worker's end closes it


def serve(listening: socket.socket) -> None:
    """Fork a worker for each request, until whoever has started this closes its standard input."""
    from importlib import import_module
    from select import select

    for name in WARM:
        import_module(name)
    assert "ray" not in sys.modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    while sys.stdin not in select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        with connection:
            if os.fork() == 0:
                listening.close()
                become_worker(connection)


def become_worker(connection: socket.socket) -> None:
    """Do in this process what the request asks for, and end it."""
    import tempfile
    from runpy import run_path

    status = 1
    try:
        os.setpgid(0, 0)  # Ray ends whole process groups
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, outputs, _, _ = socket.recv_fds(connection, 8, len(OUTPUTS))
        with connection.makefile("rb") as stream:
            arguments, environment, directory = json.loads(stream.read(int.from_bytes(size, "big")))
        for received, output in zip(outputs, OUTPUTS, strict=True):
            os.dup2(received, output)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # found out in the server's environment
        os.chdir(directory)
        sys.argv = arguments
        run_path(arguments[0], run_name="__main__")
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        hand_on(sys.argv[1], sys.argv[2:])
