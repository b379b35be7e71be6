"""Values of JSON against schemas of JSON: the few kinds that the routes of a server need, with defaults filled in."""

from typing import Any

from lens.errors import LARGEST_FLOAT, LensError, number, shown, text

Schema = dict[str, Any]
NUMBER: Schema = {'type': 'number'}


def may(*schemas: Schema, about: str) -> Schema:
    """Returns the schema of a value that may be missing."""
    return {'anyOf': [*schemas, {'type': 'null'}], 'description': about, 'default': None}


def record(properties: dict[str, Schema], *required: str) -> Schema:
    """Returns the schema of an object with these keys and no others."""
    return {'type': 'object', 'properties': properties, 'required': list(required), 'additionalProperties': False}


def check(value: Any, schema: Schema, name: str) -> Any:
    """Returns a value of JSON with defaults filled in. Raises LensError where it is not of the schema."""
    if 'anyOf' in schema:
        fits = (x for x in schema['anyOf'] if x['type'] == ('array' if isinstance(value, list) else 'string'))
        return None if value is None else check(value, next(fits, schema['anyOf'][0]), name)
    if 'enum' in schema:
        same = [x for x in schema['enum'] if isinstance(x, bool) == isinstance(value, bool) and x == value]
        if not same:
            raise LensError(f'{name}={shown(repr(value), 80)} must be one of {shown(repr(schema["enum"]))}.')
        return same[0]
    kind = schema['type']
    if kind == 'boolean' and not isinstance(value, bool):
        raise LensError(f'{name}={shown(repr(value), 80)} must be true or false.')
    if kind in ('integer', 'number'):
        whole = kind == 'integer'
        value = int(value) if whole and isinstance(value, float) and value.is_integer() else value
        return number(value, name, schema.get('minimum'), schema.get('maximum'), whole=whole)
    if kind == 'string':
        return text(value, name, schema['maxLength'])
    if kind == 'array':
        if not isinstance(value, list) or not schema['minItems'] <= len(value) <= schema['maxItems']:
            has = f' of {len(value)}' if isinstance(value, list) else ''
            raise LensError(
                f'{name} must be a list of {schema["minItems"]} to {schema["maxItems"]} entries, it is '
                f'{type(value).__name__}{has}.'
            )
        if schema['items'] == NUMBER and {*map(type, value)} == {float} and max(map(abs, value)) <= LARGEST_FLOAT:
            return value  # a prompt is half a million numbers
        return [check(x, schema['items'], f'{name}[{i}]') for i, x in enumerate(value)]
    if kind == 'object':
        return _object(value, schema, name)
    return value


def _object(value: Any, schema: Schema, name: str) -> dict:
    if not isinstance(value, dict):
        raise LensError(f'{name} must be an object, it is {type(value).__name__}.')
    if (known := schema.get('properties')) is None:
        return value
    if unknown := [k for k in value if k not in known]:
        raise LensError(f'{shown(unknown[0], 60)} is no key of {name}: it takes {", ".join(known)}.')
    if missing := [k for k in schema['required'] if k not in value]:
        raise LensError(f'{name} lacks {missing[0]}.')
    return {k: check(value[k], x, k) if k in value else x.get('default') for k, x in known.items()}
