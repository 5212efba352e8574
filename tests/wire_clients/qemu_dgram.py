"""Plays QEMU's `-netdev dgram` over Unix sockets: a datagram is a frame, and nothing announces the VM.

  qemu_dgram.py LOCAL REMOTE    path to path; QEMU binds LOCAL and never connects; it is started twice
  qemu_dgram.py fd NUMBER       one end of a socket pair
"""

import os
import socket
import sys
import time

from frames import LIMIT, exchange, wait_for, wait_readable

NET_BUFSIZE = 4096 + 65536  # QEMU's include/net/net.h


class Datagrams:
    def __init__(self, sock, remote):
        self.sock, self.remote = sock, remote

    def send(self, frame):
        start = time.monotonic()
        while True:
            try:
                if self.remote:
                    self.sock.sendto(frame, self.remote)
                else:
                    self.sock.send(frame)
                return
            except (BlockingIOError, PermissionError, ConnectionRefusedError) as error:
                # QEMU waits if there is no space. It drops a frame that is refused, and the guest sends
                # it again.
                if time.monotonic() - start > LIMIT:
                    raise SystemExit(f"the peer does not take a frame: {error}")
                time.sleep(0.001)

    def receive(self):
        wait_readable(self.sock)
        frame, sender = self.sock.recvfrom(NET_BUFSIZE)
        if not frame:
            raise SystemExit("an empty datagram, after which QEMU reads nothing any more")
        if self.remote and sender != self.remote:
            raise SystemExit(f"a frame from {sender} and not from {self.remote}")
        return frame


def main():
    if sys.argv[1] == "fd":
        with socket.socket(fileno=int(sys.argv[2])) as sock:
            sock.setblocking(False)
            exchange(Datagrams(sock, None), 60, 1514)
    else:
        local, remote = sys.argv[1:3]
        wait_for(remote)
        for _ in range(2):
            # QEMU does not remove its path when it ends, and replaces it when it starts.
            if os.path.exists(local):
                os.unlink(local)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.bind(local)
                exchange(Datagrams(sock, remote), 60, 1514)
    print("ok")


main()
