"""The HTTP APIs of the daemons as OpenAPI documents; nothing here is imported until one is wanted.

    python -m rbee.api queen

prints one. `rbee.api.queen`, `hive` and `worker` say what there is, `rbee.api.schema` makes JSON
Schema of the wire classes.
"""
