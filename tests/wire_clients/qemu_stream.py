"""Plays QEMU's `-netdev stream` over a Unix socket: a length of 32 bits, big-endian, and a frame.

  qemu_stream.py connect PATH [--header]   as `server=off`, twice: QEMU ends and is started again
  qemu_stream.py serve PATH                as `server=on`: after a disconnect it listens again
  qemu_stream.py fd NUMBER                 as `-netdev socket,fd=NUMBER`

With --header it plays libkrun's unixstream with NET_FLAG_INCLUDE_VNET_HEADER: a virtio_net_hdr of 12
bytes is in front of each frame, and the length counts it.
"""

import socket
import struct
import sys

from frames import LIMIT, exchange

NET_BUFSIZE = 4096 + 65536  # QEMU's include/net/net.h
MTU_FRAME = 1514


class Stream:
    def __init__(self, sock, header):
        self.sock, self.header, self.sent = sock, header, 0
        sock.settimeout(LIMIT)

    def send(self, frame):
        payload = self.header + frame
        data = struct.pack(">I", len(payload)) + payload
        # QEMU goes on where a partial write ended, so even a length may come in two pieces.
        self.sent += 1
        cut = [len(data), 1, 3, 4, 5, len(data) - 1][self.sent % 6]
        for piece in (data[:cut], data[cut:]):
            if piece:
                self.sock.sendall(piece)

    def receive(self):
        (length,) = struct.unpack(">I", self.exactly(4))
        if length == 0:
            raise SystemExit("a length of 0, after which QEMU 7.2 reads nothing any more")
        if length > NET_BUFSIZE:
            raise SystemExit("serious error: oversized packet received, connection terminated.")
        payload = self.exactly(length)
        if self.header and payload[:10] != bytes(10):
            raise SystemExit(f"the header of a plain frame is {payload[:12].hex()}")
        return payload[len(self.header) :]

    def exactly(self, count):
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise SystemExit("the connection ended")
            data += more
        return data


def main():
    how, where = sys.argv[1:3]
    header = bytes(12) if "--header" in sys.argv else b""
    if how == "connect":
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(where)
                exchange(Stream(sock, header), 60, MTU_FRAME)
    elif how == "serve":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.settimeout(LIMIT)
            listener.bind(where)
            listener.listen(1)
            for _ in range(2):
                sock, _ = listener.accept()
                with sock:
                    exchange(Stream(sock, header), 60, MTU_FRAME)
    else:
        with socket.socket(fileno=int(where)) as sock:
            exchange(Stream(sock, header), 60, MTU_FRAME)
    print("ok")


main()
