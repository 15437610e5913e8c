"""Anchors: responses that are drawn, filtered, scored once and kept in a store."""
