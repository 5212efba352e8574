"""Connections of TCP as no kernel makes them, each with a server outside that is as it should be.

use: odd.py INTERFACE SERVER FILE
"""

import random
import select
import sys
import time

from scapy.all import (
    ARP, ICMP, IP, TCP, UDP, Ether, Raw, conf, fuzz, get_if_hwaddr, srp1, wrpcap,
)

conf.verb = 0
INTERFACE, SERVER, FILE = sys.argv[1:4]
# The kernel does not know this address, so it resets nothing.
OWN = "192.168.64.50"
LIMIT = 30
MAC = get_if_hwaddr(INTERFACE)
question = Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(psrc=OWN, hwsrc=MAC, pdst="192.168.64.1")
answer = None
while answer is None:
    answer = srp1(question, iface=INTERFACE, timeout=2)
GATEWAY = answer.hwsrc
SOCKET = conf.L2socket(iface=INTERFACE)


def ethernet():
    return Ether(src=MAC, dst=GATEWAY)


class Connection:
    """One end of a connection."""

    def __init__(self, port, own, first=1000, window=60000):
        self.port, self.own, self.window = port, own, window
        self.seq, self.ack = first, 0
        self.send("S", ack=0, options=[("MSS", 1000)])
        synack = self.until(lambda tcp: tcp.flags == "SA" and tcp.ack == first + 1)
        self.seq, self.ack = first + 1, (synack.seq + 1) % 2**32
        self.send("A")

    def send(self, flags, data=b"", seq=None, ack=None, options=(), urgent=0):
        segment = TCP(
            sport=self.own, dport=self.port, flags=flags, window=self.window, urgptr=urgent,
            seq=(self.seq if seq is None else seq) % 2**32,
            ack=(self.ack if ack is None else ack) % 2**32, options=list(options),
        )
        packet = ethernet() / IP(src=OWN, dst=SERVER) / segment
        SOCKET.send(packet / Raw(data) if data else packet)

    def next(self, wait):
        """The next segment for this connection, if one comes."""
        end = time.time() + wait
        while (left := end - time.time()) > 0:
            if not select.select([SOCKET], [], [], left)[0]:
                break
            packet = SOCKET.recv()
            if packet is None or TCP not in packet or packet[IP].src != SERVER:
                continue
            tcp = packet[TCP]
            if (tcp.sport, tcp.dport) == (self.port, self.own):
                tcp.len = packet[IP].len - packet[IP].ihl * 4 - tcp.dataofs * 4
                return tcp
        return None

    def until(self, wanted):
        end = time.time() + LIMIT
        while time.time() < end:
            tcp = self.next(1)
            if tcp is not None and wanted(tcp):
                return tcp
        raise SystemExit(f"nothing comes at port {self.own}")

    def read(self, count):
        """Takes so many bytes in order, and acknowledges them."""
        got, end = b"", time.time() + LIMIT
        while len(got) < count:
            if time.time() > end:
                raise SystemExit(f"{len(got)} of {count} bytes at port {self.own}: {got[:40]}")
            tcp = self.next(1)
            if tcp is None or not tcp.len:
                continue
            if tcp.seq == self.ack:
                data = bytes(tcp.payload)[: tcp.len]
                got += data
                self.ack = (self.ack + len(data)) % 2**32
            self.send("A")
        return got

    def expect(self, wanted):
        got = self.read(len(wanted))
        if got != wanted:
            raise SystemExit(f"{got} instead of {wanted} at port {self.own}")

    def write(self, data):
        self.send("PA", data)
        self.seq += len(data)


# What comes twice is what it was the first time.
c = Connection(7, 2001)
c.send("PA", b"abcdefghij")
c.send("PA", b"FGHIJklmno", seq=c.seq + 5)
c.seq += 15
c.expect(b"abcdefghijklmno")
# What comes in the wrong order, in one go or not, comes again.
c.send("PA", b"second", seq=c.seq + 5)
c.send("PA", b"first")
c.send("PA", b"second", seq=c.seq + 5)
c.seq += 11
c.expect(b"firstsecond")
# Urgent data is data.
c.send("PAU", b"urgent", urgent=3)
c.seq += 6
c.expect(b"urgent")
c.send("PAU", b"more", urgent=60000)
c.seq += 4
c.expect(b"more")
# Acknowledgments of the past and of the future.
c.send("A", ack=c.ack - 20)
c.send("A", ack=c.ack + 1000000)
c.send("A", ack=c.ack - 2**31)
c.write(b"after odd acknowledgments")
c.expect(b"after odd acknowledgments")
# A keep-alive, with a byte of the past or without one, is answered.
for data in (b"", b"x"):
    c.send("A", data, seq=c.seq - 1)
    c.until(lambda tcp: tcp.ack == c.seq % 2**32)
# The end of another stream ends nothing.
c.send("FA", seq=c.seq + 1000)
c.send("FA", seq=c.seq - 1000)
c.write(b"still open")
c.expect(b"still open")
# A SYN of long ago opens nothing, and one that begins anew does.
c.send("S", seq=c.seq, ack=0)
c = Connection(7, 2001, first=900000000)
c.write(b"anew")
c.expect(b"anew")
c.send("R")
c = Connection(7, 2001, first=4294967290)
c.write(b"across the end of the numbers")
c.expect(b"across the end of the numbers")
c.send("FA")
c.until(lambda tcp: "F" in tcp.flags)

# A window that closes: what is in flight is dropped, as Linux does when it has no memory.
c = Connection(19, 2002, window=4000)
begin = c.read(1000)
c.window = 0
c.send("A")
while c.next(0.3) is not None:
    pass
c.window = 3000
c.send("A")
rest = c.read(9000)
# A window whose right edge moves to the left.
c.window = 500
c.send("A")
while c.next(0.3) is not None:
    pass
c.window = 5000
c.send("A")
rest += c.read(50000)
if begin + rest != bytes(i % 251 for i in range(60000)):
    raise SystemExit("the stream with a window that closes is another one")
c.send("R")

# Flags that go together with no others, and options that lie.
for flags in ("", "FSRPAU", "SF", "SR", "F", "FPU"):
    SOCKET.send(ethernet() / IP(src=OWN, dst=SERVER) / TCP(sport=2003, dport=7, flags=flags))
for options in (b"\x02\x00", b"\x02\x04", b"\x03\x03\xff", b"\x05\x0a1", b"\xfe\x02\x02\x04\x00\x00"):
    tcp = TCP(sport=2004, dport=7, flags="S", dataofs=5 + (len(options) + 3) // 4)
    SOCKET.send(ethernet() / IP(src=OWN, dst=SERVER) / tcp / Raw(options.ljust(8, b"\x00")))

# Destinations that no guest reaches.
for to in ("127.0.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "169.254.169.254"):
    for l4 in (TCP(sport=2005, dport=8000, flags="S"), UDP(sport=2005, dport=8000) / b"hello"):
        SOCKET.send(ethernet() / IP(src=OWN, dst=to) / l4)

# What is made up, for somebody else to send. The same comes each time.
random.seed(17)
packets = []
for number in range(600):
    ip = IP(src=OWN, dst=SERVER)
    kind = number % 6
    if kind == 0:
        packet = ip / fuzz(TCP(sport=2001, dport=7, chksum=None, dataofs=None)) / Raw(b"x" * (number % 90))
    elif kind == 1:
        packet = ip / TCP(sport=2010 + number % 7, dport=7, flags=random.randrange(512),
                          seq=random.getrandbits(32), ack=random.getrandbits(32))
    elif kind == 2:
        packet = IP(src=OWN, dst=SERVER, ihl=random.randrange(16), len=random.randrange(100)) / TCP()
    elif kind == 3:
        packet = ip / UDP(sport=2001, dport=7, len=random.randrange(2000)) / Raw(b"y" * (number % 90))
    elif kind == 4:
        packet = ip / ICMP(type=random.randrange(20), code=random.randrange(20)) / Raw(bytes(ip)[:8])
    else:
        packet = IP(src=OWN, dst=SERVER, flags=random.randrange(8), frag=random.randrange(8192),
                    proto=random.choice((6, 17))) / Raw(random.randbytes(40))
    whole = bytes(ethernet() / packet)
    # Some are cut off.
    packets.append(Ether(whole[: random.randrange(14, len(whole) + 1)] if number % 9 == 0 else whole))
wrpcap(FILE, packets)
print("all is well")
