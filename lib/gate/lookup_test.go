package gate

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/bottle-tools/bottle/lib/audit"
	"github.com/bottle-tools/bottle/lib/guest"
	"github.com/bottle-tools/bottle/lib/plan"
)

// lookup asks as the guest's resolver does.
func (g *rig) lookup(name string) (*guest.Lookup, *refusalBody) {
	g.t.Helper()
	c := g.dial()
	defer c.Close()
	fmt.Fprintf(c, "GET %s?name=%s HTTP/1.1\r\nHost: %s\r\n\r\n", guest.LookupPath, url.QueryEscape(name), guest.LookupHost)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		g.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		return nil, decode(g.t, resp)
	}
	var l guest.Lookup
	if err := json.NewDecoder(resp.Body).Decode(&l); err != nil {
		g.t.Fatal(err)
	}
	return &l, nil
}

// noResolver is for names that may not leave.
type noResolver struct{ t *testing.T }

func (r noResolver) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	r.t.Errorf("%s was resolved", host)
	return nil, errors.New("no")
}

func TestLookup(t *testing.T) {
	g := start(t, []plan.Rule{
		allowHost("api.test", "tls", 443), allowHost("api.test", "ssh", 22), allowHost("*.wild.test", "tls", 443, 8443),
		{Host: "no.wild.test", Ports: []int{}, Protocol: "any", Verdict: "deny", Class: "exact", From: "bottle.json:2:1"},
	}, nil, func(c *Config) { c.Resolver = noResolver{t} })
	for name, want := range map[string]string{
		"api.test": "[{22 ssh} {443 tls}]", "API.test.": "[{22 ssh} {443 tls}]", "a.b.wild.test": "[{443 tls} {8443 tls}]",
	} {
		if l, f := g.lookup(name); f != nil || fmt.Sprint(l.Services) != want {
			t.Errorf("%s: %v, %+v; want %s", name, l, f, want)
		}
	}
	for name, code := range map[string]string{
		"other.test": "not_in_allowlist", "wild.test": "not_in_allowlist", "no.wild.test": "denied_by_rule", "127.1": "bad_host", "": "bad_host",
	} {
		if l, f := g.lookup(name); f == nil || f.Error.Code != code || f.Error.Reason == "" {
			t.Errorf("%q: %v, %+v; want %s", name, l, f, code)
		}
	}
	e := g.await("lookup", func(e audit.Event) bool { return e.Host == "other.test" })
	if e.Event != audit.KindLookup || e.Verdict != audit.Deny || e.Code != "not_in_allowlist" || e.Port != 0 {
		t.Errorf("%+v", e)
	}
	// What is allowed is written when it is used.
	for _, e := range g.events() {
		if e.Verdict == audit.Allow {
			t.Errorf("%+v", e)
		}
	}
}

// Other requests in origin form stay refused, the same one inside a tunnel too.
func TestLookupIsOneRequestOnly(t *testing.T) {
	o := startOrigin(t, false, echo)
	g := start(t, []plan.Rule{pin(allowHost("plain.test", "http", o.port), "127.0.0.1")}, nil, nil)
	for _, head := range []string{"POST " + guest.LookupPath, "GET " + guest.LookupPath + "/x", "GET /"} {
		c := g.dial()
		fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: x\r\n\r\n", head)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != 400 || decode(t, resp).Error.Code != "bad_request" {
			t.Errorf("%s: %s", head, resp.Status)
		}
	}
	_, _, c := g.connect(hostPort("plain.test", o.port))
	fmt.Fprintf(c, "GET %s?name=x HTTP/1.1\r\nHost: %s\r\n\r\n", guest.LookupPath, hostPort("plain.test", o.port))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 200 || len(o.log()) != 1 {
		t.Errorf("%v, %v: not the origin's: %v", resp, err, o.log())
	}
}

// A guest that asks for ever new names fills neither log nor memory.
func TestLookupFlood(t *testing.T) {
	g := start(t, []plan.Rule{allowHost("api.test", "tls", 443)}, nil, nil)
	for i := range 3 * lookupLines {
		g.lookup(fmt.Sprintf("label-%d.evil.test", i))
		g.lookup("label-0.evil.test")
	}
	g.gate.Close()
	<-g.done
	g.done <- nil
	lines, listed := 0, 0
	for _, e := range g.events() {
		if e.Event != audit.KindLookup {
			continue
		}
		if lines++; e.Code == "too_many_names" {
			if !strings.HasPrefix(e.Reason, fmt.Sprint(2*lookupLines)+" lookups") {
				t.Errorf("%+v", e)
			}
			continue
		}
		listed++
	}
	if listed != lookupLines || lines != lookupLines+1 {
		t.Errorf("%d names listed in %d lines", listed, lines)
	}
}

func TestLookupLinesWindow(t *testing.T) {
	var l lookups
	now := time.Now()
	for i := range lookupLines + 5 {
		if ok, _ := l.admit(fmt.Sprint(i), now); ok != (i < lookupLines) {
			t.Fatalf("%d: %v", i, ok)
		}
	}
	if ok, dropped := l.admit("0", now.Add(lookupWindow)); ok || dropped != 5 {
		t.Errorf("a known name in the next window: %v, %d dropped", ok, dropped)
	}
	if ok, dropped := l.admit("0", now.Add(lookupAgain)); !ok || dropped != 0 {
		t.Errorf("a known name much later: %v, %d dropped", ok, dropped)
	}
	for i := range 5 * lookupNames {
		l.admit(fmt.Sprint("n", i), now.Add(time.Duration(i)*lookupWindow))
	}
	if len(l.seen) > lookupNames {
		t.Errorf("%d names are remembered", len(l.seen))
	}
}

// What is no name at all is not remembered whole.
func TestLookupOfMonsters(t *testing.T) {
	g := start(t, []plan.Rule{allowHost("api.test", "tls", 443)}, nil, nil)
	c := g.dial()
	for i := range 20 {
		status, _, code := raw(t, c, fmt.Sprintf("GET %s?name=%d%s HTTP/1.1\r\nHost: x\r\n\r\n", guest.LookupPath, i, strings.Repeat("a", 60_000)))
		if status != 403 || code != "bad_host" {
			t.Fatalf("%d %s", status, code)
		}
	}
	g.gate.lookups.mu.Lock()
	defer g.gate.lookups.mu.Unlock()
	if len(g.gate.lookups.seen) != 20 {
		t.Errorf("%d names are remembered", len(g.gate.lookups.seen))
	}
	for name := range g.gate.lookups.seen {
		if len(name) > longestName {
			t.Fatalf("a name of %d bytes is remembered", len(name))
		}
	}
}
