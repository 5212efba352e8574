"""Plays the VMMs that speak unixgram: a datagram is a frame, and the VMM connects to the helper's path.

  unixgram.py vfkit PATH              vfkit: its socket beside PATH, buffers first, then the magic
  unixgram.py vfkit-quiet PATH        the same with `vfkitMagic=off`
  unixgram.py krunkit PATH            libkrun: its socket in the temporary folder, the magic first
  unixgram.py krunkit-quiet PATH      the same without NET_FLAG_VFKIT
  unixgram.py krunkit-header PATH     the same with NET_FLAG_INCLUDE_VNET_HEADER

Each is started twice, as a VM that is started again.
"""

import os
import random
import socket
import sys
import tempfile
import time

from frames import LIMIT, exchange, wait_readable

LIBKRUN_BUFFER = 65550 + 12


class Gram:
    def __init__(self, sock, header):
        self.sock, self.header = sock, header

    def send(self, frame):
        try_again(lambda: self.sock.send(self.header + frame))

    def receive(self):
        wait_readable(self.sock)
        payload = self.sock.recv(LIBKRUN_BUFFER)
        if payload == b"VFKT":
            raise SystemExit("the helper has sent the magic, which is the VM's")
        if self.header and payload[:10] != bytes(10):
            raise SystemExit(f"the header of a plain frame is {payload[:12].hex()}")
        return payload[len(self.header) :]


def try_again(send):
    """A VM that is started again at once finds the helper's socket still with the former one (EPERM on
    Linux). Its owner starts it again."""
    start = time.monotonic()
    while True:
        try:
            return send()
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() - start > LIMIT:
                raise SystemExit(f"the helper does not take it: {error}")
            time.sleep(0.005)


def set_buffers(sock, send, receive):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)


def run(how, path, number):
    name, _, variant = how.partition("-")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        if name == "vfkit":
            own = f"vfkit-{os.getpid():x}-{random.getrandbits(32):x}.sock"
            own = os.path.join(os.path.dirname(path), own)
        else:
            own = os.path.join(tempfile.gettempdir(), f"krun-net-{os.getpid()}-{number}.sock")
        if os.path.exists(own):
            os.unlink(own)
        sock.bind(own)
        try:
            try_again(lambda: sock.connect(path))
            magic = variant != "quiet"
            if name == "vfkit":
                set_buffers(sock, 1 << 20, 4 << 20)
            if magic:
                try_again(lambda: sock.send(b"VFKT"))
            if name != "vfkit":
                set_buffers(sock, 7 << 20, 7 << 20)
            sock.setblocking(False)
            header = bytes(12) if variant == "header" else b""
            exchange(Gram(sock, header), 60, 1514)
        finally:
            os.unlink(own)


def main():
    how, path = sys.argv[1:3]
    for number in range(2):
        run(how, path, number)
    print("ok")


main()
