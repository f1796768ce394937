"""From commands to bytes on a socket and back. Each module here sees only the ones above it:

``resp`` (the protocol, no IO) · ``socket`` (non-blocking system calls) · ``ready`` (the event loop) ·
``dial`` (redis-py makes the connection) · ``connection`` (requests and replies in flight) · ``topology`` (which server).
"""
