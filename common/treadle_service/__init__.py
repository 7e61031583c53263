"""What every Treadle service is built from: settings, server, interceptors, principal, channels, logs.

Knows gRPC and no torch; knows nothing of runs, adapters or any particular service.
"""
