"""One attempt: the wire protocol without I/O, and its transport over aiohttp."""
