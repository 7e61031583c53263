"""The gateway over HTTP: one server, one set of keys and scopes, several faces.

A face translates one existing API into calls of the gateway's own methods and keeps no state. To add one: write a
package here with `make_face(gateway) -> Face` whose routes each name the scopes that they need, and list it in
`assembly.py`.
"""
