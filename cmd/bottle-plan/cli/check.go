package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/bottle-tools/bottle/lib/manifest"
	"github.com/bottle-tools/bottle/lib/tool"
)

func checkCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-plan check")
	file := fs.String("m", defaultManifest, "read the manifest from `FILE`; - is stdin")
	return &tool.Command{
		Name:       "check",
		ShortUsage: "bottle-plan check [-m FILE]",
		ShortHelp:  "tell everything that is wrong with a manifest",
		LongHelp: `
Prints one line for each problem on stderr, with file, line, column, the path
inside the document and what to do, and exits 65; or says ok and exits 0.`,
		FlagSet: fs,
		Exec: func(_ context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			m, err := loadManifest(p, *file)
			if err != nil {
				return err
			}
			for _, a := range m.Agents() {
				if _, err := m.Plan(a); err != nil {
					return err
				}
			}
			_, err = fmt.Fprintf(p.Stdout, "%s: ok, agents: %s\n", m.Name, strings.Join(m.Agents(), ", "))
			return writeFailed(err)
		},
	}
}

func schemaCommand(p *tool.Proc) *tool.Command {
	return &tool.Command{
		Name:       "schema",
		ShortUsage: "bottle-plan schema",
		ShortHelp:  "print the JSON Schema of the manifest",
		LongHelp: `
For editors: save it as bottle.schema.json and start the manifest with
"$schema": "./bottle.schema.json". bottle-plan check knows more than a schema
can say.`,
		Exec: func(_ context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			_, err := p.Stdout.Write(manifest.Schema)
			return writeFailed(err)
		},
	}
}
