"""What the clients share: frames to send, and the check that each comes back whole and in order.

The other side sends each frame back with its two addresses exchanged.
"""

import os
import random
import select
import time

LIMIT = 60.0  # seconds; far longer than any step needs


def frames(count, longest):
    """Frames of all kinds of lengths. The first is an ARP of 42 bytes, which nobody has padded."""
    dice = random.Random(7)
    for number in range(count):
        length = 42 if number == 0 else dice.choice([14, 60, 64, 590, longest - 1, longest])
        head = bytes(6 * [0xFF]) + bytes([0x52, 0x54, 0, 0x12, 0x34, number % 256])
        kind = b"\x08\x06" if number == 0 else b"\x88\xb5"
        yield head + kind + bytes((number + i) % 251 for i in range(length - 14))


def answered(frame):
    return frame[6:12] + frame[0:6] + frame[12:]


def exchange(wire, count, longest, window=4):
    """Sends frames and waits for each to come back."""
    waiting = []
    for frame in frames(count, longest):
        wire.send(frame)
        waiting.append(answered(frame))
        if len(waiting) > window:
            check(wire.receive(), waiting.pop(0))
    for expected in waiting:
        check(wire.receive(), expected)


def check(received, expected):
    if received != expected:
        raise SystemExit(
            f"{len(received)} bytes came back, {received[:24].hex()}..., instead of"
            f" {len(expected)}, {expected[:24].hex()}..."
        )


def wait_readable(sock):
    if not select.select([sock], [], [], LIMIT)[0]:
        raise SystemExit("nothing came back")


def wait_for(path):
    """Waits for a socket's file."""
    start = time.monotonic()
    while not os.path.exists(path):
        if time.monotonic() - start > LIMIT:
            raise SystemExit(f"there is no {path}")
        time.sleep(0.01)
