"""A deterministic simulation of client, aiohttp and emulator, in virtual time.

`loop` has the clock, `network` and `transport` the connections, `climate` the faults,
`plan` all choices of a seed, `world` and `bulk_stop` the use of the client,
`check_bulk` and `check_calls` the rules that must hold afterwards, and `faults` known
mistakes to put back in.
"""
