"""The Dagster UI and its daemon on a home."""

import signal
import socket
import subprocess

from mtmd_assets.faults import UsageError
from mtmd_assets.home import CHECKOUT, SCRIPTS, Home


def serve(home: Home, port: int) -> int:
    """Dagster's web server and daemon on this home, until interrupted.

    Raises:
        UsageError: if the port is not free.
    """
    from mtmd_assets.runs import bury_dead, instance_of

    _require_free(port)
    for site in home.sites():
        site.warehouse.create()
    folder = home.prepare_dagster()
    with instance_of(folder) as instance:
        bury_dead(instance)
    command = [str(SCRIPTS / "dg"), "dev", "-w", str(CHECKOUT / "workspace.yaml"), "-p", str(port)]
    children: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        for child in children:
            child.terminate()

    # a Ctrl-C reaches both, what stops a service this process only
    signal.signal(signal.SIGTERM, end)
    # which a shell has had ignored if it started this in the background; Dagster stops its own processes by it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # not in the checkout, whose dagster.yaml is for those who start Dagster without a home
        children.append(subprocess.Popen(command, cwd=folder))
        return children[0].wait()
    except KeyboardInterrupt:  # the child has it too, and takes a while
        for child in children:
            child.wait()
        return 0


def _require_free(port: int) -> None:
    """Insist that nobody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as e:
            another = "choose another with --port (make ui PORT=3001)"
            raise UsageError(f"port {port} cannot be had ({e}): {another}") from e
