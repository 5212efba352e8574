"""Plays `socket_vmnet_client PATH -- COMMAND`: connects a stream socket, and replaces itself by a command
that inherits it as descriptor 3. The command is QEMU's `-netdev socket,fd=3`.

  socket_vmnet.py PATH
"""

import os
import socket
import sys


def main():
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(sys.argv[1])
    if sock.fileno() == 3:
        os.set_inheritable(3, True)
    else:
        os.dup2(sock.fileno(), 3)
    qemu = os.path.join(os.path.dirname(os.path.abspath(__file__)), "qemu_stream.py")
    os.execv(sys.executable, [sys.executable, qemu, "fd", "3"])


main()
