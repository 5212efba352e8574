"""Plays a virtual machine behind a helper: it gets an address by DHCP, and asks the gateway for its own by
ARP. It knows nothing of vmring.

  guest.py stream FD MAC           frames with a length in front, as QEMU's `-netdev socket,fd=FD`
  guest.py datagram FD MAC         a frame is a message, as QEMU's `-netdev dgram` and vfkit's `fd=FD`
  guest.py vfkit PATH MAC          the same over a path, with the four bytes of vfkit first
  guest.py quiet PATH MAC          the same without them: an ARP of 42 bytes is first

It prints the address, the gateway's and the router's, which is `-` if there is none.
"""

import os
import socket
import struct
import sys
import time

LIMIT = 60.0  # seconds; far longer than any step needs
ZERO, ALL = bytes(4), b"\xff" * 4


class Stream:
    def __init__(self, sock):
        self.sock = sock

    def send(self, frame):
        self.sock.sendall(struct.pack(">I", len(frame)) + frame)

    def receive(self):
        (length,) = struct.unpack(">I", self.exactly(4))
        return self.exactly(length)

    def exactly(self, count):
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise SystemExit("the helper has closed the connection")
            data += more
        return data


class Datagram:
    def __init__(self, sock):
        self.sock = sock

    def send(self, frame):
        self.sock.send(frame)

    def receive(self):
        return self.sock.recv(65550)


def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def dhcp(mac, kind, options):
    """A message to the server (RFC 2131), in a frame."""
    flags = 0x8000  # The answer goes to all, since nobody has an address yet.
    head = struct.pack(">4BIHH", 1, 1, 6, 0, 0x7A11, 0, flags) + 4 * ZERO + mac + bytes(10 + 192)
    body = head + b"\x63\x82\x53\x63\x35\x01" + bytes([kind]) + options + b"\xff"
    udp = struct.pack(">HHHH", 68, 67, 8 + len(body), 0) + body
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + ZERO + ALL
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    return b"\xff" * 6 + mac + b"\x08\x00" + ip + udp


def answer(frame, mac):
    """The kind, the address and the options of a server's message to this client."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 17 or frame[34:36] != b"\x00\x43":
        return None
    body = frame[42:]
    if body[28:34] != mac:
        return None
    options, rest = {}, body[240:]
    while rest and rest[0] != 255:
        if rest[0] == 0:
            rest = rest[1:]
            continue
        options[rest[0]] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    return options[53][0], body[16:20], options


def ask(wire, frame, wanted):
    """Sends the frame until the wanted answer comes."""
    start = time.monotonic()
    while time.monotonic() - start < LIMIT:
        wire.send(frame)
        wire.sock.settimeout(1)
        try:
            while True:
                found = wanted(wire.receive())
                if found:
                    return found
        except (TimeoutError, socket.timeout):
            pass
    raise SystemExit("nobody answers")


def arp(mac, own, whose):
    return (
        b"\xff" * 6 + mac + b"\x08\x06" + bytes.fromhex("0001080006040001")
        + mac + own + bytes(6) + whose
    )


def join(wire, mac):
    def is_kind(kind):
        def check(frame):
            found = answer(frame, mac)
            return found if found and found[0] == kind else None

        return check

    offer = ask(wire, dhcp(mac, 1, b"\x37\x02\x01\x03"), is_kind(2))
    server = offer[2][54]
    request = b"\x32\x04" + offer[1] + b"\x36\x04" + server + b"\x37\x02\x01\x03"
    ack = ask(wire, dhcp(mac, 3, request), is_kind(5))
    own = ack[1]

    def is_reply(frame):
        return frame[12:14] == b"\x08\x06" and frame[21] == 2 and frame[28:32] == server

    ask(wire, arp(mac, own, server), is_reply)
    return own, server, ack[2].get(3)


def main():
    how, where, mac = sys.argv[1:4]
    mac = bytes.fromhex(mac.replace(":", ""))
    if how in ("stream", "datagram"):
        sock = socket.socket(fileno=int(where))
        wire = Stream(sock) if how == "stream" else Datagram(sock)
        found = join(wire, mac)
    else:
        own = f"{where}.vm-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(own)
            try:
                sock.connect(where)
                if how == "vfkit":
                    sock.send(b"VFKT")
                else:
                    # It is shorter than 64 bytes, and it is a frame: it must be answered.
                    sock.send(arp(mac, bytes([192, 168, 64, 99]), bytes([192, 168, 64, 1])))
                    sock.settimeout(LIMIT)
                    if sock.recv(2000)[12:14] != b"\x08\x06":
                        raise SystemExit("the first frame is not answered")
                found = join(Datagram(sock), mac)
            finally:
                os.unlink(own)
    print(" ".join(socket.inet_ntoa(one) if one else "-" for one in found), flush=True)


main()
