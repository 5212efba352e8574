"""Plays a program that starts `vmnet-helper` and a virtual machine with a socket pair between them, as
minikube's drivers and the `run` of vmnet-helper's repository do.

  owner.py HELPER... -- OPTION...

It prints the line that the helper has printed, what the virtual machine has got, and how the helper ended.
"""

import json
import os
import socket
import subprocess
import sys
import threading

LIMIT = 60.0


def main():
    cut = sys.argv.index("--")
    helper, options = sys.argv[1:cut], sys.argv[cut + 1 :]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65 * 1024)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
        os.set_inheritable(sock.fileno(), True)
    command = helper + [f"--fd={theirs.fileno()}"] + options
    process = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()])
    theirs.close()
    watchdog = threading.Timer(LIMIT, process.kill)
    watchdog.start()
    line = process.stdout.readline()
    interface = json.loads(line)
    guest = os.path.join(os.path.dirname(os.path.abspath(__file__)), "guest.py")
    mac = interface["vmnet_mac_address"]
    vm = subprocess.run(
        [sys.executable, "-B", guest, "datagram", str(ours.fileno()), mac],
        pass_fds=[ours.fileno()],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    process.terminate()
    rest = process.stdout.read()
    status = process.wait()
    watchdog.cancel()
    print(line.decode(), end="")
    print(vm.stdout, end="")
    print(status, len(rest))


main()
