"""A pace in Redis or Valkey, for the processes of many machines (extra `redis`)."""

from bctrl_async.pace._redis import RedisPace

__all__ = ["RedisPace"]
