"""Tests of the adapter store."""
