package cli

import (
	"context"
	_ "embed"
	"fmt"
	"strconv"
	"strings"

	"github.com/bottle-tools/bottle/lib/fault"
	"github.com/bottle-tools/bottle/lib/tool"
)

//go:embed starter.json
var starter string

// allowMark is the line of the starter behind which the hosts of --with go.
const allowMark = "        \"allow\": [\n"

func initCommand(p *tool.Proc) *tool.Command {
	fs := p.Flags("bottle-plan init")
	with := fs.String("with", "", "allow the package hosts that your own settings name: `TOOLS` is npm, pip, go, or several with commas")
	return &tool.Command{
		Name:       "init",
		ShortUsage: "bottle-plan init [--with npm,pip,go] >bottle.json",
		ShortHelp:  "print a manifest to start from",
		LongHelp: `
The manifest runs as it is, for root and for a plain user.

--with reads, once and from your own settings only, where your package tools
fetch from, and writes those hosts into the manifest as they are:
    npm  ~/.npmrc, npm_config_registry
    pip  ~/.config/pip/pip.conf, ~/.pip/pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL
    go   GOPROXY, ~/.config/go/env
Settings of a project are never read: a repository must not open hosts.`,
		FlagSet: fs,
		Exec: func(_ context.Context, args []string) error {
			if err := tool.NoArgs(args); err != nil {
				return err
			}
			hosts, err := packageHosts(p, *with)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(p.Stdout, starterWith(hosts))
			return writeFailed(err)
		},
	}
}

// packageHosts reads the settings of the named tools, and warns about each that
// has none that could be used.
func packageHosts(p *tool.Proc, with string) ([]packageHost, error) {
	if with == "" {
		return nil, nil
	}
	var all []packageHost
	seen := map[string]bool{}
	for _, name := range strings.Split(with, ",") {
		t, ok := packageTools[name]
		if !ok {
			return nil, fault.New(fault.Usage, "usage", "--with does not know %q", name).WithHint("it takes npm, pip and go, with commas between")
		}
		if seen[name] {
			return nil, fault.New(fault.Usage, "usage", "--with names %s twice", name)
		}
		seen[name] = true
		s := &settings{home: p.Getenv("HOME"), getenv: p.Getenv, warn: p.Warn, tool: name}
		t.read(s)
		if len(s.hosts) == 0 {
			p.Warn("%s: no host was found in %s; %s", name, t.where, t.how)
		}
		all = append(all, s.hosts...)
	}
	return all, nil
}

// starterWith lays hosts into the starter's allowlist.
func starterWith(hosts []packageHost) string {
	if len(hosts) == 0 {
		return starter
	}
	var b strings.Builder
	b.WriteString(allowMark)
	seen := map[string]bool{}
	for _, h := range hosts {
		key := h.host + ":" + strconv.Itoa(h.port)
		if seen[key] {
			continue
		}
		seen[key] = true
		ports := ""
		if h.port != 443 {
			ports = fmt.Sprintf(", \"ports\": [%d]", h.port)
		}
		fmt.Fprintf(&b, "          { \"host\": %q%s, \"why\": %q },\n", h.host, ports, h.why)
	}
	return strings.Replace(starter, allowMark, b.String(), 1)
}
