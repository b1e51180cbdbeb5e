package manifest

import _ "embed"

// Schema is the JSON Schema (draft 2020-12) of the manifest, for editors. Load
// refuses all that it refuses, and more.
//
//go:embed bottle.schema.json
var Schema []byte
