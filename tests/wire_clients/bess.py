"""Plays user-mode Linux with `vec0:transport=bess,dst=PATH`: a socket of sequenced packets, which it connects
to PATH; a message is a frame. It is started twice.

  bess.py PATH
"""

import socket
import sys

from frames import LIMIT, exchange


class Packets:
    def __init__(self, sock):
        self.sock = sock
        sock.settimeout(LIMIT)

    def send(self, frame):
        self.sock.send(frame)

    def receive(self):
        frame = self.sock.recv(65536)
        if not frame:
            raise SystemExit("the connection ended")
        return frame


def main():
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(sys.argv[1])
            exchange(Packets(sock), 60, 1514)
    print("ok")


main()
