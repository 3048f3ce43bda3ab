"""One attempt over HTTP: requests and responses (sans-IO), transport and pool."""
