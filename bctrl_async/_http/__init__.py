"""One attempt over HTTP: operations, requests and responses (sans-IO), transport, pool."""
